"""Faults of a real server: hostile requests, and a killed worker. What they must not do: see `test_faults.py`."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from tests.support.random_steering import as_text, random_rules
from tests.support.served import GONE, Server, serving
from vllm_steermoe_plugin.lab.world import examples
from vllm_steermoe_plugin.models import lab_checkpoint
from vllm_steermoe_plugin.models.checkpoints import shape_in

JSON = {"Content-Type": "application/json"}
ECHO = 4096
"""Characters of a refusal at most, whatever was asked."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # Engine core and worker are processes of their own, as in production.
    arguments = ("--allow-experts", "--allow-reverse", "--distributed-executor-backend", "mp")
    with serving(tmp_path_factory.mktemp("faults"), *arguments) as running:
        yield running


def experts(seed: int) -> str:
    return as_text(random_rules(shape_in(lab_checkpoint.MODEL_DIR), seed))


PIECES = [
    "digits",
    "refusal",
    "none",
    "@2",
    ":reverse",
    ":activate=2",
    ":phase=prompt",
    "+",
    ":",
    "\x00",
    "é",
    "\U0001f600",
]
PIECES += [
    '{"activate":',
    '{"0":[0]}',
    "}",
    "[",
    "null",
    "1e999",
    ",",
    '"phase":"generation"',
    "9" * 5000,
    " " * 999,
    "\\",
]


def hostile(draw: random.Random) -> Any:
    """A value for `vllm_xargs`, or for one of its keys."""
    text = "".join(draw.choice(PIECES) for _ in range(draw.randint(0, 6)))
    number = draw.choice([0, -1, 1 << 63, 10**300, 0.5, -0.0, True, None])
    value = draw.choice([text, text, text, number, [text, number], [], [[text]], {"a": text}, {}])
    key = draw.choice(["steermoe", "steermoe", "steermoe", "steermoe_count", "steermoe ", "STEERMOE", ""])
    return draw.choice([{key: value}, {key: value}, {key: value, "other": value}, value])


def test_hostile_requests_are_answered_or_refused_and_change_nothing(server: Server) -> None:
    prompts = [example.prompt for example in examples("digits", "test")[:3]]
    before = [server.ask(None, prompt) for prompt in prompts]
    steered = [[server.ask(asked, prompt) for prompt in prompts] for asked in ("digits", "digits:reverse")]
    assert {status for status, _ in sum(steered, before)} == {200}
    assert steered[0] != steered[1], "steering must show for this to show anything"
    draw = random.Random(0)
    cases = [hostile(draw) for _ in range(300)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda xargs: server.ask_with(xargs, max_tokens=2), cases))
    for xargs, (status, text) in zip(cases, answers, strict=True):
        assert status in (200, 400), (xargs, status, text)
        assert len(text) < ECHO or status == 200, (str(xargs)[:200], len(text))
    assert {status for status, _ in answers} == {200, 400}
    for xargs, (status, _) in zip(cases, answers, strict=True):
        if status == 200 and isinstance(xargs, dict) and xargs.get("steermoe") is not None:
            # What was accepted is a text that steers or says that it does not want to.
            assert isinstance(xargs["steermoe"], str), xargs
    assert [server.ask(None, prompt) for prompt in prompts] == before
    assert [server.ask("digits:reverse", prompt) for prompt in prompts] == steered[1]


def body(value: str) -> bytes:
    """A request whose steering is a JSON value that no JSON library would write."""
    asked = f'"prompt": "a", "max_tokens": 1, "vllm_xargs": {{"steermoe": {value}}}'
    return f'{{"model": "{lab_checkpoint.NAME}", {asked}}}'.encode()


BODIES = {
    "NaN": body("NaN"),
    "infinity": body("1e999"),
    "a key twice": body('"none", "steermoe": "x"'),
    "half a surrogate": body('"\\ud800"'),
    "a million brackets": body('"{' + "[" * 10**6 + '"'),
    "two million letters": body('"' + "a" * 2 * 10**6 + '"'),
    "a number of a million digits": body('"{\\"activate\\": {\\"0\\": [' + "1" * 10**6 + ']}}"'),
    "a bare number of a million digits": body("1" * 10**6),
    "a list of a million": body("[" + "0," * 10**6 + "0]"),
}


@pytest.mark.parametrize("name", BODIES)
def test_oversized_and_odd_bodies_are_refused_in_few_words(name: str, server: Server) -> None:
    status, text = server.call("v1/completions", BODIES[name], headers=JSON)
    assert status == 400, text[:500]
    assert len(text) < ECHO
    assert server.ask(max_tokens=1)[0] == 200


def test_a_killed_worker_ends_every_request_with_an_error_and_the_server_with_it(server: Server) -> None:
    """Last in this file: it ends the server."""
    processes = psutil.Process(server.process.pid).children(recursive=True)
    workers = [p for p in processes if "Worker" in " ".join(p.cmdline() or [p.name()])]
    assert workers, [p.cmdline() for p in processes]
    steerings = [experts(i) if i % 2 else None for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        waiting = [
            pool.submit(server.ask, steer, f"Number {i}.", max_tokens=480, ignore_eos=True)
            for i, steer in enumerate(steerings)
        ]
        deadline = time.monotonic() + 60
        while server.metric("vllm:num_requests_running") < len(waiting):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(workers[0].pid, signal.SIGKILL)
        # `call` gives up after two minutes, so a request that hangs shows as GONE by a timeout.
        answers = [future.result() for future in waiting]
    for status, text in answers:
        assert status in (GONE, 500, 503), (status, text)
        assert "timed out" not in text, "a request hung"
    assert server.process.wait(timeout=120) is not None
    assert server.ask()[0] == GONE
    _, left = psutil.wait_procs(processes, timeout=60)
    assert not left, [process.cmdline() for process in left]
