"""An OpenAI-compatible endpoint on this machine that does what a test tells it to."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Endpoint:
    """What was asked, and what is answered: `plan` takes a request's number to (status, body, headers)."""

    def __init__(self, plan=None):
        self.plan = plan or (lambda number: None)
        self.requests, self.headers, self.url = [], [], ""


def questions(number, count=12):
    """A usual answer: a numbered list, with words around it."""
    lines = "\n".join(f"{i + 1}. what is number {number} {i} about?" for i in range(count))
    return f"Here are the questions:\n{lines}\n"


@contextmanager
def serving(plan=None):
    """Inside the block an `Endpoint` answers at `url`."""
    told = Endpoint(plan)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                told.requests.append(body)
                told.headers.append(dict(self.headers))
                number = len(told.requests) - 1
            planned = told.plan(number)
            if planned is None:
                asked = body["messages"][0]["content"]
                text = questions(sum(map(ord, asked)) + body["seed"])
                usage = {"prompt_tokens": 50, "completion_tokens": 100}
                planned = (200, json.dumps({"choices": [{"message": {"content": text}}], "usage": usage}), {})
            status, text, headers = planned
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    told.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
