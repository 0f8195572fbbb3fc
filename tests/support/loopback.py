"""A web server on this machine that gives files, and can be told to misbehave."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote

Answer = Callable[[BaseHTTPRequestHandler, bytes | None], bool]
"""Gets the request and the file it asks for; answers and says so, or leaves it to the server."""


class Loopback:
    """Files by path; `with Loopback({"/a": b"..."}) as server: server.url + "a"`."""

    def __init__(self, files: dict[str, bytes], answer: Answer = lambda request, data: False) -> None:
        self.files = files
        self.requests: list[tuple[str, str | None]] = []
        """Path and Range header of each request."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = unquote(self.path.partition("?")[0])
                outer.requests.append((path, self.headers.get("Range")))
                self.close_connection = True
                data = outer.files.get(path)
                if not outer.answer(self, data):
                    outer.give(self, data)

            do_HEAD = do_GET

            def log_message(self, *arguments: Any) -> None:
                pass

        self.answer = answer
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    @staticmethod
    def give(request: BaseHTTPRequestHandler, data: bytes | None, **headers: str) -> None:
        """An honest answer, with ranges."""
        wanted = request.headers.get("Range")
        status, body = (404, b"no such file") if data is None else (200, data)
        if data is not None and wanted:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            status, body = (206, data[start:]) if start < len(data) else (416, b"")
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    def __enter__(self) -> Loopback:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
