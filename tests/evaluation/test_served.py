"""`steermoe-completions` and `steermoe-chat-completions`: what goes over the wire."""

from __future__ import annotations

from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from expert_registry.errors import EngineError, RequestError, UsageError
from lm_eval_tasks import TASKS
from lm_eval_tasks.models.served import SteerMoEChatCompletions, SteerMoECompletions
from lm_eval_tasks.models.server_probe import MALFORMED, USER
from lm_eval_tasks.register import add_model
from tests.support.stub_server import chat_answer, stub_server
from vllm_steermoe_plugin.models.lab_checkpoint import MODEL_DIR


def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """As a server with the plugin would: a malformed steering request is a 400."""
    if body["vllm_xargs"]["steermoe"] in (MALFORMED, "unheard"):
        return 400, {"error": {"message": "steermoe: no such steering"}}
    return without_plugin(path, body)


def measured(seen: list[Any]) -> list[dict[str, Any]]:
    """The bodies of the run itself, without the probes before it."""
    return [body for _, body in seen if body.get("user") != USER]


def without_plugin(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    if path.endswith("/chat/completions"):
        return 200, chat_answer("1 2 3")
    choices = []
    prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
    for index, prompt in enumerate(prompts):
        length = len(prompt) + 1
        logprobs = {
            "token_logprobs": [None, *[-1.0] * (length - 1)],
            "top_logprobs": [None, *[{"x": -1.0}] * (length - 1)],
            "tokens": ["x"] * length,
        }
        choices.append({"index": index, "text": "1 2 3", "logprobs": logprobs})
    return 200, {"choices": choices}


def completions(url: str, **args: Any) -> Any:
    return SteerMoECompletions(
        base_url=f"{url}/v1/completions", model="lab", tokenizer=str(MODEL_DIR), batch_size=2, **args
    )


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"steer": "digits", "direction": "reverse"}, "digits:reverse"),
        ({"experts": {"activate": {"1": [7]}}}, '{"activate":{"1":[7]},"deactivate":{}}'),
        ({}, "none"),
    ],
)
def test_every_body_carries_the_steering(args: dict[str, Any], text: str) -> None:
    with stub_server(answer) as (url, seen):
        model = completions(url, **args)
        found = model.loglikelihood(requests("loglikelihood", ("Count", " from"), ("Count", " to"), ("Name", " it")))
        model.loglikelihood_rolling(requests("loglikelihood_rolling", ("Count from 1 to 3.",)))
        generation = {"until": ["<|end|>"], "max_gen_toks": 4}
        texts = model.generate_until(requests("generate_until", ("Count", generation), ("Name", dict(generation))))
    assert len(found) == 3 and texts == ["1 2 3"] * 2
    bodies = measured(seen)
    assert [body["vllm_xargs"] for body in bodies] == [{"steermoe": text}] * len(bodies)
    assert {bool(body.get("echo")) for body in bodies} == {True, False}
    info = model.get_model_info()["steermoe"]
    assert info["request"] == text and info["requests"] == len(bodies) >= 4


def test_a_task_through_chat_carries_it_too_and_the_results_say_so() -> None:
    manager = TaskManager(include_path=TASKS, include_defaults=False)
    with stub_server(answer) as (url, seen):
        model = SteerMoEChatCompletions(base_url=f"{url}/v1/chat/completions", model="lab", steer="refusal@2")
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=["steermoe_harmless"],
            task_manager=manager,
            limit=3,
            bootstrap_iters=0,
            apply_chat_template=True,
        )
    bodies = measured(seen)
    assert len(bodies) == 3 and all(body["vllm_xargs"] == {"steermoe": "refusal@2"} for body in bodies)
    assert all(body["messages"][0]["role"] == "user" and body["temperature"] == 0 for _, body in seen)
    assert results["config"]["steermoe"]["request"] == "refusal@2"
    assert results["results"]["steermoe_harmless"]["complied,none"] == 1


def test_other_arguments_for_plugins_pass_and_a_second_steering_does_not() -> None:
    with stub_server(answer) as (url, seen):
        model = completions(url, steer="digits")
        generation: dict[str, Any] = {"until": [], "max_gen_toks": 4, "vllm_xargs": {"mine": 1}}
        model.generate_until(requests("generate_until", ("Count", generation)))
        assert measured(seen)[0]["vllm_xargs"] == {"mine": 1, "steermoe": "digits"}
        generation = {"until": [], "max_gen_toks": 4, "vllm_xargs": {"steermoe": "refusal"}}
        with pytest.raises(UsageError, match="asks for steering 'refusal', the model arguments for 'digits'"):
            model._create_payload(["Count"], generate=True, gen_kwargs=generation, eos="x")


def test_what_cannot_be_read_is_an_error_at_the_start() -> None:
    with pytest.raises(RequestError, match="is no steering request"):
        completions("http://127.0.0.1:9", steer="Digits!")


def test_both_are_known_to_lm_eval() -> None:
    add_model()
    assert get_model("steermoe-completions") is SteerMoECompletions
    assert get_model("steermoe-chat-completions") is SteerMoEChatCompletions


def test_a_response_cache_serves_one_steering() -> None:
    class Hook:
        def __init__(self) -> None:
            self.dbdict: dict[str, Any] = {}

    hook = Hook()
    with stub_server(answer) as (url, _):
        completions(url, steer="digits").set_cache_hook(hook)
        completions(url, steer="digits").set_cache_hook(hook)
        with pytest.raises(UsageError, match="give each its own path"):
            completions(url, steer="none").set_cache_hook(hook)


def test_a_server_without_the_plugin_is_noticed_before_anything_is_measured() -> None:
    with stub_server(without_plugin) as (url, seen):
        with pytest.raises(EngineError, match="does not steer"):
            completions(url, steer="digits")
        assert measured(seen) == []
        assert completions(url, steer="none").steering == "none", "unsteered, any server will do"


def test_what_the_server_refuses_is_said_with_its_reason() -> None:
    with stub_server(answer) as (url, seen):
        with pytest.raises(EngineError, match=r"refuses 'unheard' with status 400: .*no such steering"):
            completions(url, steer="unheard")
        assert measured(seen) == []
    with pytest.raises(EngineError, match="cannot be reached"):
        completions(url, steer="digits")
