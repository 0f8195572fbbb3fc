"""Step 2 of the demo: `vllm serve` on loopback, and the same prompts under different steering."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from vllm_steermoe_plugin.lab.world import examples
from vllm_steermoe_plugin.models import lab_checkpoint

START_SECONDS = 600
PROMPTS_PER_BEHAVIOUR = 4


@contextmanager
def server(registry: Path, log: Path, console: Console) -> Iterator[OpenAI]:
    """A running server of steermoe-lab that knows the rankings in `registry`; stopped on the way out."""
    command = [sys.executable, "-m", "vllm_steermoe_plugin", "serve", lab_checkpoint.NAME]
    # Its own process: the demo's in-process engine settings must not reach it.
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment["STEERMOE_REGISTRY"] = str(registry)
    with ExitStack() as stack:
        with console.status(f"vllm serve {lab_checkpoint.NAME} on 127.0.0.1 (log: {log})"):
            url, _ = stack.enter_context(running([*command, "--allow-reverse", "--allow-experts"], environment, log))
        yield OpenAI(base_url=f"{url}/v1", api_key="none")


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Base URL and process of a server on a free port of loopback, once it is ready; ended on the way out.

    Raises:
        RuntimeError: it ended, or was not ready after `START_SECONDS`; with the end of its log.
    """
    port = _free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_ready(process, port, log)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def show_answers(client: OpenAI, behaviour: str, steerings: dict[str, str], console: Console) -> None:
    """Print what the server answers to some test prompts under each steering."""
    table = Table("prompt", *steerings, title=f"{behaviour}, over HTTP", title_justify="left")
    cases = examples(behaviour, "test")
    for example in cases[:: len(cases) // PROMPTS_PER_BEHAVIOUR][:PROMPTS_PER_BEHAVIOUR]:
        table.add_row(example.prompt, *_answers(client, example.prompt, list(steerings.values())))
    console.print(table)


def _answers(client: OpenAI, prompt: str, steerings: Sequence[str]) -> list[str]:
    answers = []
    for steering in steerings:
        reply = client.chat.completions.create(
            model=lab_checkpoint.NAME,
            messages=[{"role": "user", "content": prompt}],
            temperature=0.0,
            max_tokens=24,
            extra_body={"vllm_xargs": {"steermoe": steering}},
        )
        answers.append((reply.choices[0].message.content or "").strip())
    return answers


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}; its log ends:\n{_tail(log)}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise RuntimeError(f"the server was not ready after {START_SECONDS} s; its log ends:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _free_port() -> int:
    # Below the ports that a system gives to whoever asks for any: half a minute passes before the server takes it.
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
