"""A real `steermoe serve` on loopback: steering per request, and every refusal as HTTP 400 with a reason."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from served import call, serving

from expert_registry.errors import EngineError
from lm_eval_tasks.server_probe import check_server
from vllm_steermoe_plugin import lab
from vllm_steermoe_plugin.lab.world import examples, shows


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a server with the operator's default settings, so with the safe policy."""
    with serving(tmp_path_factory.mktemp("serve")) as url:
        yield f"{url}/v1"


def ask(
    server: str, steer: Any = None, prompt: str = "Hello.", path: str = "chat/completions", **more: Any
) -> tuple[int, Any]:
    """Status and answer of one request."""
    body: dict[str, Any] = {"model": lab.NAME, "temperature": 0.0, "max_tokens": 16, **more}
    body |= {"messages": [{"role": "user", "content": prompt}]} if path.startswith("chat") else {"prompt": prompt}
    if steer is not None:
        body["vllm_xargs"] = {"steermoe": steer}
    status, answer = call(f"{server}/{path}", body)
    if status != 200:
        return status, answer
    choice = answer["choices"][0]
    return status, choice["message"]["content"] if path.startswith("chat") else choice["text"]


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
    assert call(f"{server}/completions", body)[0] == 400


def test_nobody_manages_profiles_unless_the_operator_says_who(server: str) -> None:
    root = server.removesuffix("/v1")
    for method, path in (("GET", "profiles"), ("PUT", "profiles/terse"), ("POST", "rankings/refresh")):
        headers = {"Authorization": "Bearer 0123456789abcdef"}
        status, _ = call(
            f"{root}/steermoe/{path}", "digits" if method == "PUT" else None, method=method, headers=headers
        )
        assert status == 404
    status, text = ask(server, "@terse")
    assert status == 400 and "unknown loaded profile 'terse'; known: none" in text


def test_the_vllm_command_works() -> None:
    command = Path(sys.executable).parent / "vllm"
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip().endswith("0.32.0+cpu")
