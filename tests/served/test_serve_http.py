"""A real `steermoe serve` on loopback: steering per request, and every refusal as HTTP 400 with a reason."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from expert_registry.errors import EngineError
from lm_eval_tasks.models.server_probe import check_server
from tests.support import runners
from tests.support.served import Server, serving
from vllm_steermoe_plugin.lab.world import examples, shows
from vllm_steermoe_plugin.models import lab_checkpoint


def test_the_server_has_the_model_runner_of_this_run(server: Server) -> None:
    assert ("Using V2 Model Runner" in server.log.read_text()) == runners.V2


def test_steering_over_http_moves_the_answers(server: Server) -> None:
    cases = examples("digits", "test")[:40]
    with ThreadPoolExecutor(8) as pool:
        # Steered and unsteered requests are in flight together.
        steered = list(pool.map(lambda e: server.ask("digits", e.prompt), cases))
        dialled = list(pool.map(lambda e: server.ask("digits:strength=1", e.prompt), cases))
        plain = list(pool.map(lambda e: server.ask(None, e.prompt), cases))
        zero = list(pool.map(lambda e: server.ask("digits:strength=0", e.prompt), cases))
    assert {status for status, _ in steered + dialled + plain} == {200} and zero == plain
    share = [
        sum(shows("digits", e, text) for e, (_, text) in zip(cases, found, strict=True))
        for found in (steered, dialled, plain)
    ]
    assert min(share[:2]) >= share[2] + 0.2 * len(cases)


REFUSALS = {
    "unknown behaviour": ("faithfulnes", "did you mean 'faithfulness'"),
    "unknown version": ("digits@7", "digits@7"),
    "reverse": ("refusal:reverse", "allow_reverse"),
    "numbers": ("digits:activate=1", "allow_experts"),
    "experts": ('{"activate": {"1": [2]}}', "allow_experts"),
    "malformed": ("digits;", "BEHAVIOUR"),
    "malformed experts, not read": ("{", "allow_experts"),
    "unknown option": ("digits:boost=2", "boost"),
    "too strong": ("digits:strength=2.5", "max_strength"),
    "no strength": ("digits:strength=nan", "needs a number"),
    "away by strength": ("digits:strength=-0.5", "allow_reverse"),
    "some weights": ("digits:strength=1:top=5", "allow_experts"),
    "strength of forced experts": ("digits:strength=1:activate=2", "leave one out"),
    "a number": (7, "must be a string"),
    "a list": (["digits"], "must be a string"),
    "conflict": ("digits+refusal:phase=prompt", "one phase"),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_what_cannot_be_applied_is_a_400_that_says_why(server: Server, name: str, path: str) -> None:
    steer, reason = REFUSALS[name]
    status, text = server.ask(steer, path=path)
    assert status == 400, text
    assert reason in text
    assert server.ask("digits", path=path)[0] == 200, "the server goes on"


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_beam_search_refuses_steering_that_vllm_would_drop(server: Server, path: str) -> None:
    status, text = server.ask("digits", path=path, use_beam_search=True, n=2)
    assert status == 400 and "beam search" in text
    assert server.ask(None, path=path, use_beam_search=True, n=2)[0] == 200


STREAMS: dict[str, dict[str, Any]] = {
    "v1/chat/completions": {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 4},
    "v1/completions": {"prompt": ["Hello.", "Hi."], "max_tokens": 4},
    "v1/messages": {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 4},
    "v1/responses": {"input": "Hello.", "max_output_tokens": 4},
    "invocations": {"prompt": "Hello.", "max_tokens": 4},
    "inference/v1/generate": {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 4}},
}


@pytest.mark.parametrize("path", STREAMS)
def test_a_streamed_request_is_refused_before_its_answer_begins(server: Server, path: str) -> None:
    before = server.log.read_text().count("Traceback")
    for steer, reason in (("digitz", "did you mean 'digits'"), (REFUSALS["conflict"]), ("digits:reverse", "allow_rev")):
        status, text = server.call(path, streamed(path, steer))
        assert status == 400 and reason in text, text
    assert server.log.read_text().count("Traceback") == before
    for good in ("digits", None):
        status, text = streamed_text(f"{server.url}/{path}", streamed(path, good))
        assert status == 200 and "data:" in text and "error" not in text


def streamed(path: str, steer: str | None) -> dict[str, Any]:
    body = {"model": lab_checkpoint.NAME, "stream": True, **STREAMS[path]}
    asking = {"steermoe": steer} if steer is not None else None
    if "sampling_params" in body:
        return body | {"sampling_params": {**body["sampling_params"], "extra_args": asking}}
    return body | {"vllm_xargs": asking}


def streamed_text(url: str, body: dict[str, Any]) -> tuple[int, str]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return reply.status, reply.read().decode()


def test_steering_in_a_header_or_a_query_parameter_is_refused(server: Server) -> None:
    body = {"model": lab_checkpoint.NAME, "prompt": "Hello.", "max_tokens": 2}
    for query, headers in (("?steermoe=digits", {}), ("", {"SteerMoE": "digits"})):
        status, text = server.call(f"v1/completions{query}", body, headers=headers)
        assert status == 400 and "write vllm_xargs.steermoe" in text


@pytest.mark.parametrize("body", [{"prompt": "Hello."}, {"messages": [{"role": "user", "content": "Hello."}]}])
def test_what_invocations_hands_on_is_looked_at(server: Server, body: dict[str, Any]) -> None:
    body = {"model": lab_checkpoint.NAME, "max_tokens": 2, **body}
    assert server.call("invocations", body | {"vllm_xargs": {"steermoe": "digits"}})[0] == 200
    status, text = server.call("invocations", body | {"steermoe": "digits"})
    assert status == 400 and "write vllm_xargs.steermoe" in text


@pytest.mark.parametrize("place", ["steermoe", "extra_body", "extra_args", "metadata", "chat_template_kwargs"])
def test_steering_in_a_place_that_vllm_does_not_read_is_refused(server: Server, place: str) -> None:
    misplaced: dict[str, Any] = {"steermoe": "digits"}
    status, text = server.ask(None, **misplaced if place == "steermoe" else {place: misplaced})
    assert status == 400 and f"does not read {place}" in text and "write vllm_xargs.steermoe" in text


def test_steering_at_an_endpoint_that_drops_it_is_refused(server: Server) -> None:
    scored = {"model": lab_checkpoint.NAME, "query": "a", "items": ["b", "c"], "label_token_ids": [5, 6]}
    assert server.call("generative_scoring", scored)[0] == 200
    status, text = server.call("generative_scoring", scored | {"vllm_xargs": {"steermoe": "digits"}})
    assert status == 400 and "/generative_scoring does not read vllm_xargs" in text


def test_a_batch_of_chats_and_messages_are_steered(server: Server) -> None:
    case = next(e for e in examples("digits", "test") if not shows("digits", e, server.ask(None, e.prompt)[1]))
    chat: dict[str, Any] = {"model": lab_checkpoint.NAME, "temperature": 0.0, "max_tokens": 16}
    chat |= {"vllm_xargs": {"steermoe": "digits"}}
    message = {"role": "user", "content": case.prompt}
    expected = server.ask("digits", case.prompt)[1]
    status, batch = server.call("v1/chat/completions/batch", chat | {"messages": [[message], [message]]})
    assert status == 200 and [choice["message"]["content"] for choice in batch["choices"]] == [expected] * 2
    status, answer = server.call("v1/messages", chat | {"messages": [message]})
    assert status == 200 and answer["content"][0]["text"] == expected
    status, answer = server.call("v1/responses", chat | {"input": case.prompt, "max_output_tokens": 16})
    assert status == 200 and answer["output"][-1]["content"][0]["text"] == expected
    for path, asked in (
        ("chat/completions/batch", {"messages": [[message]]}),
        ("messages", {"messages": [message]}),
        ("responses", {"input": case.prompt}),
    ):
        refused = chat | asked | {"vllm_xargs": {"steermoe": "digits:reverse"}}
        status, text = server.call(f"v1/{path}", refused)
        assert status == 400 and "allow_reverse" in text, path


@pytest.mark.parametrize(
    ("extra_args", "reason"),
    [
        ({"steermoe": '{"activate": {"1": [2]}}'}, "allow_experts"),
        ({"steermoe": {"activate": {"1": [2]}}}, "must be a string"),
        ({"steermoe": "digits:reverse"}, "allow_reverse"),
        ({"steermoe_count": '{"group":1,"ranges":[[0,1]]}'}, "not over HTTP"),
        ({"steermoe": "digits"}, None),
        ({"steermoe": None}, None),
        (None, None),
    ],
)
def test_tokens_in_tokens_out_pass_the_same_check(server: Server, extra_args: Any, reason: str | None) -> None:
    body = {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 2, "extra_args": extra_args}}
    status, text = server.call("inference/v1/generate", body)
    assert status == (400 if reason else 200), text
    assert reason is None or reason in text


def test_lm_evals_probe_tells_a_server_that_steers(server: Server) -> None:
    check_server(f"{server.url}/v1/chat/completions", {}, lab_checkpoint.NAME, "digits")
    check_server(f"{server.url}/v1/completions", {}, lab_checkpoint.NAME, "faithfulness")
    with pytest.raises(EngineError, match="allow_reverse"):
        check_server(f"{server.url}/v1/completions", {}, lab_checkpoint.NAME, "digits:reverse")


def test_counting_is_not_offered_over_http(server: Server) -> None:
    body = {
        "model": lab_checkpoint.NAME,
        "prompt": "a",
        "vllm_xargs": {"steermoe_count": '{"group":1,"ranges":[[0,1]]}'},
    }
    assert server.call("v1/completions", body)[0] == 400


def test_a_server_that_only_renders_looks_at_bodies_too_and_the_vllm_command_works(tmp_path: Path) -> None:
    assert importlib.metadata.version("vllm").endswith("+cpu")
    vllm = str(Path(sys.executable).parent / "vllm")
    command = (vllm, "launch", "render", str(lab_checkpoint.MODEL_DIR), "--served-model-name", lab_checkpoint.NAME)
    with serving(tmp_path, command=command) as renderer:
        body: dict[str, Any] = {"model": lab_checkpoint.NAME, "prompt": "Hello.", "max_tokens": 2}
        status, text = renderer.call("v1/completions/render", body | {"extra_body": {"steermoe": "digits"}})
        assert status == 400 and "write vllm_xargs.steermoe" in text
        status, [rendered] = renderer.call("v1/completions/render", body | {"vllm_xargs": {"steermoe": "digits"}})
        assert status == 200 and rendered["sampling_params"]["extra_args"] == {"steermoe": "digits"}
