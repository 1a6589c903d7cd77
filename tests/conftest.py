"""Fixtures for all tests: one thread, a fresh seed that is printed, and NaN in uninitialised memory."""

import os
import random

import pytest
import torch
from tiny_models import FAMILIES, METHODS

torch.set_num_threads(1)


@pytest.fixture
def seed():
    """A fresh seed for each test; pytest shows it when the test fails. Fix it with DUALEDIT_SEED."""
    value = int(os.environ.get("DUALEDIT_SEED", random.SystemRandom().randrange(2**31)))
    print(f"DUALEDIT_SEED={value}")
    return value


@pytest.fixture
def generator(seed):
    """A torch generator from the fresh seed."""
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
