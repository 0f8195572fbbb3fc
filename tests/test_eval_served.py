"""`steermoe-completions` and `steermoe-chat-completions`: what goes over the wire."""

from __future__ import annotations

from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from stub_server import chat_answer, stub_server

from expert_registry.errors import RequestError
from lm_eval_tasks import TASKS
from lm_eval_tasks.register import add_model
from lm_eval_tasks.served import SteerMoEChatCompletions, SteerMoECompletions
from vllm_steermoe_plugin.lab import MODEL_DIR


def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    if path.endswith("/chat/completions"):
        return 200, chat_answer("1 2 3")
    choices = []
    for index, prompt in enumerate(body["prompt"]):
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
    assert [body["vllm_xargs"] for _, body in seen] == [{"steermoe": text}] * len(seen)
    assert {bool(body.get("echo")) for _, body in seen} == {True, False}
    info = model.get_model_info()["steermoe"]
    assert info["request"] == text and info["requests"] == len(seen) >= 4


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
    assert len(seen) == 3 and all(body["vllm_xargs"] == {"steermoe": "refusal@2"} for _, body in seen)
    assert all(body["messages"][0]["role"] == "user" and body["temperature"] == 0 for _, body in seen)
    assert results["config"]["steermoe"]["request"] == "refusal@2"
    assert results["results"]["steermoe_harmless"]["complied,none"] == 1


def test_other_arguments_for_plugins_pass_and_a_second_steering_does_not() -> None:
    with stub_server(answer) as (url, seen):
        model = completions(url, steer="digits")
        generation: dict[str, Any] = {"until": [], "max_gen_toks": 4, "vllm_xargs": {"mine": 1}}
        model.generate_until(requests("generate_until", ("Count", generation)))
        assert seen[0][1]["vllm_xargs"] == {"mine": 1, "steermoe": "digits"}
        generation = {"until": [], "max_gen_toks": 4, "vllm_xargs": {"steermoe": "refusal"}}
        with pytest.raises(RequestError, match="asks for steering 'refusal', the model arguments for 'digits'"):
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
    completions("http://127.0.0.1:9", steer="digits").set_cache_hook(hook)
    completions("http://127.0.0.1:9", steer="digits").set_cache_hook(hook)
    with pytest.raises(RequestError, match="give each its own path"):
        completions("http://127.0.0.1:9", steer="none").set_cache_hook(hook)
