"""Fixtures of the adapter lifecycle tests."""

import importlib.util

import pytest


@pytest.fixture
def torchvision():
    """Skips a test where torchvision is missing."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed, and Qwen's processor needs it (make test-all has it)")
