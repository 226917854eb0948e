"""A web server on this machine that answers ranges, and fails on demand."""

from __future__ import annotations

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultyServer:
    """Serves files from a dict; ``faults`` are used up, one for each request.

    A fault is an HTTP status, ``"break"`` (the connection ends half-way), ``"whole"`` (ranges are
    ignored), ``"other"`` (another range than asked), or None.
    """

    def __init__(self, files: dict[str, bytes]):
        self.files, self.faults, self.retry_after = files, [], "0"
        self.log: list[tuple[str, str | None]] = []
        self.headers: list[dict[str, str]] = []
        handler = type("Handler", (_Handler,), {"owner": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @contextlib.contextmanager
    def running(self):
        thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()

    @property
    def ranges(self):
        return [wanted for _, wanted in self.log]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultyServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        owner, wanted = self.owner, self.headers.get("Range")
        owner.log.append((self.path, wanted))
        owner.headers.append(dict(self.headers))
        data = owner.files.get(self.path.lstrip("/"))
        fault = owner.faults.pop(0) if owner.faults else None
        if isinstance(fault, int) or data is None:
            return self._send(fault or 404, b"no", {"Retry-After": owner.retry_after})
        if fault == "whole" or wanted is None:
            return self._send(200, data, {})
        first, last = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
        last = min(last, len(data) - 1)
        if fault == "other":
            first = max(0, first - 1)
        body = data[first : last + 1]
        place = {"Content-Range": f"bytes {first}-{last}/{len(data)}", "ETag": '"1"'}
        self._send(206, body, place, cut=len(body) // 2 if fault == "break" else None)

    def _send(self, status, body, headers, cut=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body[:cut])
            if cut is not None:
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
