"""A service around one edited model: questions in batches, edits one at a time, over HTTP and on a page.

from dualedit.serving import Settings, create_app

uvicorn.run(create_app(editor, Settings(token="...")))
"""

from .service import Example, Service
from .settings import Limits, Refused, Settings
from .worker import Worker

__all__ = ["Example", "Limits", "Refused", "Service", "Settings", "Worker", "create_app"]


def create_app(service: Service):
    """The FastAPI application of a service; see `app.create_app`."""
    from .app import create_app as create

    return create(service)
