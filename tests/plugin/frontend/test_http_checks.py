"""Bodies that ask for steering where vLLM drops it. That a real server refuses them: test_serve_http.py."""

from __future__ import annotations

import re
from typing import Any

import pytest

from expert_registry.errors import RequestError
from vllm_steermoe_plugin import register
from vllm_steermoe_plugin.frontend import http_checks as http_bodies
from vllm_steermoe_plugin.frontend.misplaced import READ_XARGS, asked_at, check_body, check_fields, check_names

ASKING = {"model": "m", "vllm_xargs": {"steermoe": "digits"}}


@pytest.mark.parametrize("prefix", ["", "/api"])
@pytest.mark.parametrize("path", [*READ_XARGS, "/v1/chat/completions/render", "/tokenize", "/v1/messages/count_tokens"])
def test_where_it_is_read_or_nothing_is_generated_it_is_let_in(path: str, prefix: str) -> None:
    check_body(prefix + path, ASKING)


@pytest.mark.parametrize(("path", "key"), [("chat/completions", "chat_request"), ("completions", "completion_request")])
def test_what_was_generated_is_put_into_words_with_the_request_that_asked_for_it(path: str, key: str) -> None:
    check_body(f"/v1/{path}/derender", {key: ASKING, "token_ids": [1]})
    assert asked_at(f"/v1/{path}/derender", {key: ASKING}) is None


DROPS = ("/generative_scoring", "/v1/systemone", "/cohere/v2/chat", "/cohere/v2/chat/render")
POOLS = ("/v1/embeddings", "/pooling", "/v1/score")
TOKENS_IN = "/inference/v1/generate"


@pytest.mark.parametrize("path", [*DROPS, *POOLS, "/a/new/one"])
def test_an_endpoint_that_drops_it_is_named(path: str) -> None:
    with pytest.raises(RequestError, match=f"{path} does not read vllm_xargs.*/v1/chat/completions"):
        check_body(path, ASKING)
    check_body(path, {"model": "m", "vllm_xargs": {"session_id": "1"}})
    check_body(path, {"model": "m", "vllm_xargs": {"steermoe": None}})


PLACES = (
    (),
    ("extra_args",),
    ("extra_body",),
    ("sampling_params",),
    ("vllm_xargs",),
    ("extra_body", "vllm_xargs"),
    ("extra_body", "extra_args"),
    ("sampling_params", "extra_args"),
    ("sampling_params", "vllm_xargs"),
    ("vllm_xargs", "vllm_xargs"),
    ("extra_body", "sampling_params", "extra_args"),
    ("metadata",),
    ("chat_template_kwargs",),
    ("parameters", "options", "some", "thing", "of", "theirs"),
    ("vllm-xargs",),
    ("VLLM_XARGS",),
    ("kv_transfer_params",),
)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("path", "reads"),
    [
        ("/v1/chat/completions", PLACES[4]),
        ("/v1/messages", PLACES[4]),
        ("/invocations", PLACES[4]),
        (TOKENS_IN, PLACES[7]),
    ],
)
def test_a_wrong_place_in_the_body_is_named_with_the_right_one(
    path: str, reads: tuple[str, ...], place: tuple[str, ...]
) -> None:
    body: dict[str, Any] = {"steermoe": "digits"}
    for key in reversed(place):
        body = {key: body}
    if place == reads:
        check_body(path, body)
        return
    wrong, right = (re.escape(".".join((*keys, "steermoe"))) for keys in (place, reads))
    with pytest.raises(RequestError, match=f"{path} does not read {wrong}, .*write {right}$"):
        check_body(path, body)


SPELLINGS = (
    "SteerMoE",
    " steermoe ",
    "vllm_xargs.steermoe",
    "vllm_xargs[steermoe]",
    "extra_body['steermoe']",
    "X-SteerMoE",
)


@pytest.mark.parametrize("key", SPELLINGS)
@pytest.mark.parametrize("place", ["here", "vllm_xargs", "message", "conversation"])
def test_a_wrong_spelling_is_named_too(key: str, place: str) -> None:
    asking = {key: "digits"}
    body: dict[str, Any] = {
        "here": asking,
        "vllm_xargs": {"vllm_xargs": asking},
        "message": {
            "messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hi", "extra": asking}]
        },
        "conversation": {"messages": [[{"role": "user", "content": "Hi"} | asking]]},
    }[place]
    with pytest.raises(RequestError, match=f"does not read .*{re.escape(key)}, .*write vllm_xargs.steermoe"):
        check_body("/v1/chat/completions/batch", body)
    with pytest.raises(
        RequestError, match=f"ChatRequest does not read .*{re.escape(key)}, .*write vllm_xargs.steermoe"
    ):
        check_fields("ChatRequest", body)


NAMED = {"steermoe": "a property that happens to have this name"}
SCHEMA = {"type": "object", "properties": NAMED}
USERS_OWN: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "steermoe", "parameters": SCHEMA}}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "steermoe", "schema": SCHEMA}},
    "structured_outputs": {"json": SCHEMA},
    "text": {"format": {"type": "json_schema", "schema": SCHEMA}},
    "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    "messages": [
        {"role": "user", "content": "What is steermoe?"},
        {"role": "assistant", "content": [{"type": "tool_use", "name": "steermoe", "input": NAMED}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "steermoe", "arguments": "{}"}}]},
    ],
    "input": [{"role": "user", "content": [NAMED]}],
    "documents": [NAMED],
    "prompt": "steermoe",
    "metadata": {"project": "steermoe", "note": '{"steermoe": "digits"}', "steermoe_lab": "1", "no-steermoe": "2"},
    "chat_template_kwargs": {"title": "vllm_xargs.steermoe"},
    "stop": ["steermoe"],
    "user": "steermoe",
    "logit_bias": {"5": 1},
}


@pytest.mark.parametrize("key", USERS_OWN)
@pytest.mark.parametrize("path", [*READ_XARGS, TOKENS_IN, *DROPS])
def test_what_the_user_sends_as_data_is_never_refused(path: str, key: str) -> None:
    check_body(path, {"model": "steermoe-lab", key: USERS_OWN[key]})
    check_body(path, {"sampling_params": {key: USERS_OWN[key]}})
    check_fields("ChatRequest", {key: USERS_OWN[key], "vllm_xargs": {"steermoe": "digits"}})


def test_headers_and_query_parameters_are_not_read() -> None:
    for kind, names in (("header", ["content-type", "steermoe"]), ("query parameter", ["vllm_xargs[steermoe]"])):
        with pytest.raises(RequestError, match=rf"does not read the {kind} .*steermoe.*write vllm_xargs\.steermoe"):
            check_names("/v1/completions", kind, names)
    check_names("/v1/completions", "header", ["content-type", "user-agent", "x-steermoe-lab", "cookie"])


@pytest.mark.parametrize(
    "body",
    [
        *(None, 3, [], ["steermoe"], {}, {"vllm_xargs": None}, {"vllm_xargs": ["steermoe"]}),
        *({"extra_body": "steermoe"}, {"messages": "steermoe"}, {"messages": [None, "steermoe", []]}),
    ],
)
def test_other_bodies_are_none_of_our_business(body: object) -> None:
    check_body("/generative_scoring", body)


def test_a_key_that_cannot_be_written_is_shown_as_far_as_it_can() -> None:
    with pytest.raises(RequestError) as caught:
        check_body("/v1/completions", {"half \ud800": {"a" * 1000 + "\n": {"steermoe": "digits"}}})
    assert "half ?.aaa" in str(caught.value) and len(str(caught.value).encode()) < 500


def test_a_body_may_be_as_deep_as_json_can_be() -> None:
    body: dict[str, Any] = {"steermoe": "digits"}
    for _ in range(5000):
        body = {"deeper": body}
    with pytest.raises(RequestError, match=r"does not read deeper\.deeper"):
        check_body("/v1/completions", body)


def requests_of_vllm() -> dict[str, Any]:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionRequest
    from vllm.entrypoints.speech_to_text.translation.protocol import TranslationRequest

    message = {"role": "user", "content": "Hi"}
    return {
        "chat": lambda more: ChatCompletionRequest(messages=[message], **more),
        "completion": lambda more: CompletionRequest(prompt="Hi", **more),
        "responses": lambda more: ResponsesRequest(input="Hi", **more),
        "transcription": lambda more: TranscriptionRequest.model_construct(None, **more),
        "translation": lambda more: TranslationRequest.model_construct(None, **more),
    }


@pytest.mark.parametrize("name", ["chat", "completion", "responses", "transcription", "translation"])
@pytest.mark.parametrize(
    "more", [{"steermoe": "digits"}, {"extra_body": {"steermoe": "digits"}}, {"vllm_xargs[steermoe]": "digits"}]
)
def test_forms_and_batch_files_are_looked_at_where_vllm_makes_sampling_parameters(
    name: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.exceptions import VLLMValidationError

    register()
    make = requests_of_vllm()[name]
    given = {"max_tokens": 5, "default_sampling_params": {}}
    with pytest.raises(VLLMValidationError, match=r"does not read .*steermoe.*write vllm_xargs\.steermoe"):
        make(more).to_sampling_params(*given.values())
    if name != "responses":
        with pytest.raises(VLLMValidationError, match=r"does not read .*steermoe"):
            make(more).to_beam_search_params(*given.values())
    asked = make({"vllm_xargs": {"steermoe": "digits"}, "unknown": "steermoe"})
    if name in ("chat", "completion", "responses"):
        assert asked.to_sampling_params(*given.values()).extra_args == {"steermoe": "digits"}


def test_a_requests_fields_are_looked_at_once_for_all_its_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[object] = []
    monkeypatch.setattr(http_bodies, "check_fields", lambda what, fields: looked.append(fields))
    wrapped = http_bodies._checked_fields(lambda self: None)
    make = requests_of_vllm()["completion"]
    first, second = make({}), make({})
    for request in [first] * 100 + [second] * 100 + [first]:
        wrapped(request)
    assert len(looked) == 3
