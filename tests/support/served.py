"""Services of the embedded model on ports of their own, and what is sent to them."""

import base64
import io
import socket
import threading
import time
from contextlib import contextmanager

import uvicorn
from dualedit.serving import create_app

QUESTION = "which country does this brand come from?"


def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def chat(image, question):
    picture = [] if image is None else [{"type": "image_url", "image_url": {"url": data_url(image)}}]
    return [{"role": "user", "content": [*picture, {"type": "text", "text": question}]}]


@contextmanager
def running(service):
    """Serve on a free port; gives the address."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(service), log_level="error", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not server.started and time.monotonic() < end:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
