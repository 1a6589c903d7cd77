"""The tiny models of tests/dualedit, and no frame of a call left behind by any test."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "dualedit"))

from dualedit.frames import FRAMES  # noqa: E402
from tiny_models import FAMILIES, METHODS  # noqa: E402


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture(autouse=True)
def no_frames_left():
    yield
    assert FRAMES.get() == ()
