"""Requests to a real server of the lab model, which may die meanwhile."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tests.support.served import running
from vllm_steermoe_plugin.models import lab_checkpoint

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
        body: dict[str, Any] = {"model": lab_checkpoint.NAME, "temperature": 0.0, "max_tokens": 16, **more}
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
    additional = json.dumps({"steermoe": settings})
    with running(folder, "--additional-config", additional, *arguments) as (url, process):
        yield Served(url, process)
