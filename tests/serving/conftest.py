"""Services that a test starts and that end with it."""

from contextlib import ExitStack

import pytest
from dualedit.serving import Service, Settings
from dualedit.toy.editors import load_editor
from dualedit.toy.pictures import sample_pictures
from served import running


@pytest.fixture(scope="session")
def pictures():
    """The sample pictures: a logo, the same brand again, a look-alike, and others."""
    return sample_pictures()


@pytest.fixture
def serve(tmp_path):
    """Starts services of the embedded model: `serve(folder=None, **settings)` gives (service, address)."""
    with ExitStack() as stack:

        def start(folder=None, **settings):
            service = Service(load_editor(fallback=False), folder, Settings(**settings))
            return service, stack.enter_context(running(service))

        yield start
