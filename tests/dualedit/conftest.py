"""Every tiny model and both methods, for tests that ask for them."""

import pytest
from tiny_models import FAMILIES, METHODS


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(params=METHODS)
def method(request):
    return request.param
