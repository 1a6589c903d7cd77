"""The tiny models of the other tests serve here, too."""

import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "dualedit")]


@pytest.fixture
def torchvision():
    """Skips a test where torchvision is missing."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed, and Qwen's processor needs it (make test-all has it)")
