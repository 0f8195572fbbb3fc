"""A real `steermoe serve` on loopback: steering per request, and every refusal as HTTP 400 with a reason."""

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from planted import planted_registry

from expert_registry.errors import EngineError
from lm_eval_tasks.server_probe import check_server
from vllm_steermoe_plugin import lab
from vllm_steermoe_plugin.lab.world import examples, shows


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a server with the operator's default settings, so with the safe policy."""
    folder = tmp_path_factory.mktemp("serve")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "STEERMOE_REGISTRY": str(planted_registry(folder / "registry"))}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vllm_steermoe_plugin",
                "serve",
                lab.NAME,
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ],
            env=environment,
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
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=60)


def ask(
    server: str, steer: Any = None, prompt: str = "Hello.", path: str = "chat/completions", **more: Any
) -> tuple[int, Any]:
    """Status and answer of one request."""
    body: dict[str, Any] = {"model": lab.NAME, "temperature": 0.0, "max_tokens": 16, **more}
    body |= {"messages": [{"role": "user", "content": prompt}]} if path.startswith("chat") else {"prompt": prompt}
    if steer is not None:
        body["vllm_xargs"] = {"steermoe": steer}
    request = urllib.request.Request(
        f"{server}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            choice = json.load(reply)["choices"][0]
            return reply.status, choice["message"]["content"] if path.startswith("chat") else choice["text"]
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_steering_over_http_moves_the_answers(server: str) -> None:
    cases = examples("digits", "test")[:40]
    with ThreadPoolExecutor(8) as pool:
        # Steered and unsteered requests are in flight together.
        steered = list(pool.map(lambda e: ask(server, "digits", e.prompt), cases))
        plain = list(pool.map(lambda e: ask(server, None, e.prompt), cases))
    assert {status for status, _ in steered + plain} == {200}
    share = [
        sum(shows("digits", e, text) for e, (_, text) in zip(cases, found, strict=True)) for found in (steered, plain)
    ]
    assert share[0] >= share[1] + 0.2 * len(cases)


REFUSALS = {
    "unknown behaviour": ("faithfulnes", "did you mean 'faithfulness'"),
    "unknown version": ("digits@7", "digits@7"),
    "reverse": ("refusal:reverse", "allow_reverse"),
    "numbers": ("digits:activate=1", "allow_experts"),
    "experts": ('{"activate": {"1": [2]}}', "allow_experts"),
    "malformed": ("digits;", "BEHAVIOUR"),
    "malformed JSON": ("{", "not JSON"),
    "unknown option": ("digits:strength=2", "strength"),
    "a number": (7, "text"),
    "a list": (["digits"], "text"),
    "conflict": ('{"activate": {"1": [2]}, "deactivate": {"1": [2]}}', "at once"),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_what_cannot_be_applied_is_a_400_that_says_why(server: str, name: str, path: str) -> None:
    steer, reason = REFUSALS[name]
    status, text = ask(server, steer, path=path)
    assert status == 400, text
    assert reason in text
    assert ask(server, "digits", path=path)[0] == 200, "the server goes on"


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_beam_search_refuses_steering_that_vllm_would_drop(server: str, path: str) -> None:
    status, text = ask(server, "digits", path=path, use_beam_search=True, n=2)
    assert status == 400 and "beam search" in text
    assert ask(server, None, path=path, use_beam_search=True, n=2)[0] == 200


def test_lm_evals_probe_tells_a_server_that_steers(server: str) -> None:
    check_server(f"{server}/chat/completions", {}, lab.NAME, "digits")
    check_server(f"{server}/completions", {}, lab.NAME, "faithfulness")
    with pytest.raises(EngineError, match="allow_reverse"):
        check_server(f"{server}/completions", {}, lab.NAME, "digits:reverse")


def test_counting_is_not_offered_over_http(server: str) -> None:
    body = {"model": lab.NAME, "prompt": "a", "vllm_xargs": {"steermoe_count": '{"group":1,"ranges":[[0,1]]}'}}
    request = urllib.request.Request(
        f"{server}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert caught.value.code == 400


def test_the_vllm_command_works() -> None:
    command = Path(sys.executable).parent / "vllm"
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip().endswith("0.32.0+cpu")
