"""A real `steermoe serve` of the lab model on loopback, in processes of its own, and requests to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from planted import planted_registry

from vllm_steermoe_plugin import lab

GONE = 0
"""In place of an HTTP status: the connection failed or broke."""


@dataclass
class Served:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]

    def post(self, path: str, body: bytes, timeout: float = 120) -> tuple[int, str]:
        """Status and text of the answer; `GONE` if there was none."""
        request = urllib.request.Request(f"{self.url}{path}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except (OSError, HTTPException) as error:
            return GONE, repr(error)

    def ask(self, prompt: str, xargs: Any = None, **more: Any) -> tuple[int, str]:
        """Greedy answer to a prompt."""
        body: dict[str, Any] = {"model": lab.NAME, "temperature": 0.0, "max_tokens": 16, **more}
        body["messages"] = [{"role": "user", "content": prompt}]
        if xargs is not None:
            body["vllm_xargs"] = xargs
        status, text = self.post("/v1/chat/completions", json.dumps(body).encode())
        return status, json.loads(text)["choices"][0]["message"]["content"] if status == 200 else text

    def metric(self, name: str) -> float:
        """The sum of a Prometheus metric."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as reply:
            lines = reply.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


@contextmanager
def serving(folder: Path, settings: dict[str, Any], *arguments: str) -> Iterator[Served]:
    """A server with these settings of the plugin; it is ended at the end, if it has not ended before."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "STEERMOE_REGISTRY": str(planted_registry(folder / "registry"))}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    command = [sys.executable, "-m", "vllm_steermoe_plugin", "serve", lab.NAME, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--additional-config", json.dumps({"steermoe": settings}), *arguments]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 400
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        yield Served(f"http://127.0.0.1:{port}", process)
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=60)
