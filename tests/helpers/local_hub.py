"""A server on this machine that speaks the Hugging Face Hub's protocol, faults included."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub:
    """Repositories as dicts of files; ``fault`` makes every file request fail in some way.

    ``fault`` is an HTTP status, ``"break"`` (the connection ends in the middle of a file), or
    None. ``log`` holds the method, path and Range of every request.
    """

    def __init__(self, repos: dict[str, dict[str, bytes]]):
        self.repos, self.fault, self.gated = repos, None, False
        self.log: list[tuple[str, str, str | None]] = []
        self.tokens: set[str | None] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @contextlib.contextmanager
    def running(self):
        thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, with_body: bool):
        hub, wanted = self.hub, self.headers.get("Range")
        hub.log.append((self.command, self.path, wanted))
        hub.tokens.add(self.headers.get("Authorization"))
        path = self.path.split("?")[0].lstrip("/")
        if path.startswith("api/models/"):
            return self._api(path.removeprefix("api/models/"))
        repo, _, rest = path.partition("/resolve/")
        file = rest.partition("/")[2]
        if isinstance(hub.fault, int):
            return self._refuse(hub.fault)
        if hub.gated:
            return self._refuse(403, "GatedRepo", "Access to this model is restricted")
        if repo not in hub.repos:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if file not in hub.repos[repo]:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        return self._file(hub.repos[repo][file], wanted, with_body)

    def _api(self, rest: str):
        repo = rest.split("/revision/")[0].split("/tree/")[0]
        if isinstance(self.hub.fault, int):
            return self._refuse(self.hub.fault)
        if repo not in self.hub.repos:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if "/tree/" in rest:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": COMMIT}
                for name, data in self.hub.repos[repo].items()
            ]
            return self._send(200, json.dumps(tree).encode())
        files = [{"rfilename": name} for name in self.hub.repos[repo]]
        return self._send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": files}).encode())

    def _file(self, data: bytes, wanted: str | None, with_body: bool):
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        self.send_response(206 if wanted else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not with_body:
            return
        if self.hub.fault == "break":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(body)

    def _refuse(self, status: int, code: str = "", message: str = "no"):
        headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        if status == 429:
            headers["Retry-After"] = "0"
        self._send(status, b'{"error": "no"}', headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
