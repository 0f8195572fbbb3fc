"""A real `steermoe serve` of the lab model on loopback, and how to ask it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.folders import ROOT
from tests.support.planted import planted_registry
from vllm_steermoe_plugin.models import lab_checkpoint

SERVE = (sys.executable, "-m", "vllm_steermoe_plugin", "serve", lab_checkpoint.NAME)


@contextmanager
def serving(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None, command: Sequence[str] = SERVE
) -> Iterator[str]:
    """Base URL of a server; see `running`."""
    with running(folder, *arguments, environment=environment, command=command) as (url, _):
        yield url


@contextmanager
def running(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None, command: Sequence[str] = SERVE
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server with a registry of all planted rankings in `folder`, ended at the end if it has not ended before.

    Its base URL and its process; its log is `folder/log`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {**os.environ, "STEERMOE_REGISTRY": str(planted_registry(folder / "registry")), **(environment or {})}
    variables.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *arguments],
            env=variables,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 400
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=60)


def call(
    url: str, body: object = None, *, method: str = "POST", headers: Mapping[str, str] | None = None
) -> tuple[int, Any]:
    """Status and answer of one request; a `body` that is no text or bytes goes as JSON."""
    data = body if body is None or isinstance(body, bytes) else body.encode() if isinstance(body, str) else None
    sent = dict(headers or {})
    if body is not None and data is None:
        data, sent["Content-Type"] = json.dumps(body).encode(), "application/json"
    request = urllib.request.Request(url, data, sent, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        return error.code, text
