"""A real `steermoe serve` of the lab model on loopback, which may die meanwhile, and how to ask it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from examples.demo.serving import running
from tests.support.alone import environment_alone
from tests.support.planted import planted_registry
from vllm_steermoe_plugin.models import lab_checkpoint

SERVE = (sys.executable, "-m", "vllm_steermoe_plugin", "serve", lab_checkpoint.NAME)
GONE = 0
"""In place of an HTTP status: the connection failed or broke."""


@dataclass(frozen=True)
class Server:
    """A running server, with its log and whatever else it writes in the log's folder."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def call(
        self, path: str, body: object = None, *, method: str = "POST", headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and answer of one request, an answer other than 200 as text; `GONE` if there was none.

        A `body` that is no text or bytes goes as JSON.
        """
        data = body if body is None or isinstance(body, bytes) else body.encode() if isinstance(body, str) else None
        sent = dict(headers or {})
        if body is not None and data is None:
            data, sent["Content-Type"] = json.dumps(body).encode(), "application/json"
        request = urllib.request.Request(f"{self.url}/{path}", data, sent, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except (OSError, HTTPException) as error:
            return GONE, repr(error)

    def ask(
        self, steer: Any = None, prompt: str = "Hello.", path: str = "chat/completions", **more: Any
    ) -> tuple[int, Any]:
        """Status and text of the greedy answer to a prompt under a steering."""
        return self.ask_with({"steermoe": steer} if steer is not None else None, prompt, path, **more)

    def ask_with(
        self, xargs: Any, prompt: str = "Hello.", path: str = "chat/completions", **more: Any
    ) -> tuple[int, Any]:
        """The same with any `vllm_xargs`."""
        body: dict[str, Any] = {"model": lab_checkpoint.NAME, "temperature": 0.0, "max_tokens": 16, **more}
        body |= {"messages": [{"role": "user", "content": prompt}]} if path.startswith("chat") else {"prompt": prompt}
        status, answer = self.call(f"v1/{path}", body if xargs is None else body | {"vllm_xargs": xargs})
        if status != 200:
            return status, answer
        choice = answer["choices"][0]
        return status, choice["message"]["content"] if path.startswith("chat") else choice["text"]

    def metric(self, name: str) -> float:
        """The sum of a Prometheus metric."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as reply:
            lines = reply.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


@contextmanager
def serving(folder: Path, *arguments: str, command: Sequence[str] = SERVE, **environment: str) -> Iterator[Server]:
    """A server with a registry of all planted rankings in `folder`, its log in `folder/log`."""
    registry = str(planted_registry(folder / "registry"))
    variables = environment_alone("VLLM_ENABLE_V1_MULTIPROCESSING", STEERMOE_REGISTRY=registry, **environment)
    with running([*command, *arguments], variables, folder / "log") as (url, process):
        yield Server(url, process, folder / "log")
