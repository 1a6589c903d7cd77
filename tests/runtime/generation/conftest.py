"""No frame of a call is left behind by any test of generation."""

import pytest
from dualedit.runtime.frames import FRAMES


@pytest.fixture(autouse=True)
def no_frames_left():
    yield
    assert FRAMES.get() == ()
