"""One built model for all tests of an architecture, and the line that it gets in the support table."""

from __future__ import annotations

import pytest
from seeds import seed_of

from .builders import ARCHITECTURES, FIRST
from .case import Case


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        rows = [a for a in ARCHITECTURES.values() if a.sees != "nothing"]
        parameters = [
            pytest.param(a, id=a.name, marks=() if a.name in FIRST else pytest.mark.tier2) for a in rows
        ]
        metafunc.parametrize("case", parameters, indirect=True, scope="module")


@pytest.fixture(scope="module")
def case(request):
    """The architecture's base answers, and the same model with an edit in it."""
    return Case(request.param, seed_of(f"architecture {request.param.name}"))


@pytest.fixture
def support(case, record_property):
    """Note a cell of the support table: support("beams", "yes")."""
    return lambda column, value: record_property(f"support:{case.name}:{column}", value)
