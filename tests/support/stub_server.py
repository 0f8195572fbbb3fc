"""An OpenAI-compatible server on the loopback that records bodies and answers what a function says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def stub_server(
    answer: Callable[[str, dict[str, Any]], tuple[int, Any]], models: Sequence[str] = ()
) -> Iterator[tuple[str, list[Any]]]:
    """Gives the base URL and the list of `(path, body)` so far; `answer(path, body)` is status and JSON.

    `models` are listed under `/v1/models`; with none there is no such route.
    """
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body))
            status, value = answer(self.path, body)
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            data = json.dumps({"data": [{"id": name, "root": f"{name}-checkpoint"} for name in models]}).encode()
            self.send_response(200 if models else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def chat_answer(text: str) -> dict[str, Any]:
    """The body of a chat completion."""
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}], "model": "stub"}
