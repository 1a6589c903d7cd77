"""A stand-in for the model hub on this machine: repositories that are made, pushed to, and fetched again."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 39 + "1"


class Hub:
    """The routes that `push_to_hub`, `from_pretrained` and `snapshot_download` call.

    Attributes:
        files: repository to path to contents.
        asked: what was requested, method and path.
    """

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        hub = self

        class Routes(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            do_POST = do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Routes)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request):
        path = unquote(urlsplit(request.path).path)
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.asked.append(f"{request.command} {path}")
        found = self.route(request.command, path, body)
        status, content, headers = (
            found if found is not None else (404, b"{}", {"X-Error-Code": "EntryNotFound"})
        )
        request.send_response(status)
        for name, value in {"Content-Type": "application/json", "X-Repo-Commit": COMMIT, **headers}.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    def route(self, command, path, body):
        if path == "/api/repos/create":
            made = json.loads(body)
            name = "/".join(filter(None, (made.get("organization"), made["name"])))
            name = name if "/" in name else f"me/{name}"
            self.files.setdefault(name, {})
            return 200, json.dumps({"url": f"{self.address}/{name}", "name": name}).encode(), {}
        if path == "/api/whoami-v2":
            return 200, b'{"name": "me", "type": "user", "orgs": []}', {}
        if path == "/api/validate-yaml":
            return 200, b'{"errors": [], "warnings": []}', {}
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self.api("/".join(parts[2:4]), parts[4:], body)
        if len(parts) > 4 and parts[2] == "resolve":
            return self.file("/".join(parts[:2]), "/".join(parts[4:]))
        return None

    def api(self, name, rest, body):
        files = self.files.get(name)
        if files is None:
            return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        if rest[:1] == ["preupload"]:
            asked = json.loads(body)["files"]
            told = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
            return 200, json.dumps({"files": told}).encode(), {}
        if rest[:1] == ["commit"]:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            told = {
                "commitUrl": f"{self.address}/{name}/commit/{COMMIT}",
                "commitOid": COMMIT,
                "success": True,
            }
            return 200, json.dumps(told).encode(), {}
        if rest[:1] in ([], ["revision"]):
            listed = [{"rfilename": path} for path in files]
            return 200, json.dumps({"id": name, "sha": COMMIT, "siblings": listed}).encode(), {}
        if rest[:1] == ["tree"]:
            listed = [{"type": "file", "path": p, "size": len(c), "oid": _etag(c)} for p, c in files.items()]
            return 200, json.dumps(listed).encode(), {}
        return None

    def file(self, name, path):
        content = self.files.get(name, {}).get(path)
        if content is None:
            return None
        return 200, content, {"ETag": f'"{_etag(content)}"', "Content-Type": "application/octet-stream"}


def _etag(content):
    return hashlib.sha1(content).hexdigest()
