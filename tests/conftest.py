"""Fixtures for all tests: one thread, a seed by the test's name, and NaN in uninitialised memory."""

import pytest
import torch
from seeds import VARIABLE, seed_of, settle
from tiny_models import FAMILIES, METHODS

torch.set_num_threads(1)


def pytest_configure():
    settle()  # before worker processes start, so that all of them have the same


def pytest_report_header():
    return f"seeds: {VARIABLE}={settle()} repeats this run; {VARIABLE}=random draws another"


@pytest.fixture
def seed(request):
    """The test's own seed, which does not depend on other tests; pytest shows it when the test fails."""
    value = seed_of(request.node.nodeid)
    print(f"seed {value} ({VARIABLE}={settle()})")
    return value


@pytest.fixture(scope="module", autouse=True)
def own_cache(request, tmp_path_factory):
    """No test but those of `smol` itself depends on what the user has fetched."""
    with pytest.MonkeyPatch.context() as patch:
        if "smol" not in request.path.parts:
            patch.setenv("DUALEDIT_CACHE", str(tmp_path_factory.getbasetemp() / "nothing-fetched"))
        yield


@pytest.fixture
def generator(seed):
    """A torch generator from the test's seed."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def poison():
    """Fill uninitialised memory with NaN (integers: the largest value), so that a skipped write shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request):
    """Every tiny model."""
    return request.param


@pytest.fixture(params=METHODS)
def method(request):
    """Both methods."""
    return request.param
