"""Where a body may ask for steering, and where vLLM would drop it. That a server refuses it: test_middleware.py."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_registry.errors import RequestError
from vllm_steermoe_plugin.frontend.misplaced import (
    READ_XARGS,
    asked_at,
    check_beams,
    check_body,
    check_names,
    has_beams,
)

ASKING = {"model": "m", "vllm_xargs": {"steermoe": "digits"}}
TOKENS_IN = "/inference/v1/generate"
SPEECH = ("/v1/audio/transcriptions", "/v1/audio/translations")
DROPS = ("/generative_scoring", "/v1/systemone", "/cohere/v2/chat", "/cohere/v2/chat/render", "/v1/embeddings")
DROPS += ("/pooling", "/v1/decisions", "/v1/score", "/a/new/one")
XARGS, IN_TOKENS_IN = ("vllm_xargs",), ("sampling_params", "extra_args")
READS = {"/v1/chat/completions": XARGS, "/v1/messages": XARGS, "/invocations": XARGS, TOKENS_IN: IN_TOKENS_IN}
PLACES = (
    *((), ("extra_args",), ("extra_body",), ("sampling_params",), XARGS, IN_TOKENS_IN, ("metadata",)),
    *(("extra_body", "vllm_xargs"), ("sampling_params", "vllm_xargs"), ("vllm_xargs", "vllm_xargs")),
    *(("parameters", "options", "some", "thing", "of", "theirs"), ("vllm-xargs",), ("VLLM_XARGS",)),
    *(("chat_template_kwargs",), ("kv_transfer_params",), ("extra_body", "sampling_params", "extra_args")),
)
SPELLINGS = ("SteerMoE", " steermoe ", "vllm_xargs.steermoe", "vllm_xargs[steermoe]", "extra_body['steermoe']")
SPELLINGS += ("X-SteerMoE",)


def within(place: tuple[str, ...], value: object) -> dict[str, Any]:
    for key in reversed(place):
        value = {key: value}
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("prefix", ["", "/api"])
def test_where_it_is_read_or_nothing_is_generated_it_is_let_in(prefix: str) -> None:
    for path in (*READ_XARGS, *SPEECH, "/v1/chat/completions/render", "/tokenize", "/v1/messages/count_tokens"):
        check_body(prefix + path, ASKING)
        assert asked_at(prefix + path, ASKING) == {"steermoe": "digits"}


def test_what_was_generated_is_put_into_words_with_the_request_that_asked_for_it() -> None:
    for path, key in (("chat/completions", "chat_request"), ("completions", "completion_request")):
        check_body(f"/v1/{path}/derender", {key: ASKING, "token_ids": [1]})
        assert asked_at(f"/v1/{path}/derender", {key: ASKING}) is None


@pytest.mark.parametrize("path", DROPS)
def test_an_endpoint_that_drops_it_is_named(path: str) -> None:
    with pytest.raises(RequestError, match=f"{path} does not read vllm_xargs.*/v1/chat/completions"):
        check_body(path, ASKING)
    check_body(path, {"model": "m", "vllm_xargs": {"session_id": "1"}})
    check_body(path, {"model": "m", "vllm_xargs": {"steermoe": None}})


@pytest.mark.parametrize("path", READS)
def test_a_wrong_place_in_the_body_is_named_with_the_right_one(path: str) -> None:
    reads = READS[path]
    for place in PLACES:
        body = within((*place, "steermoe"), "digits")
        if place == reads:
            check_body(path, body)
            continue
        wrong, right = (re.escape(".".join((*keys, "steermoe"))) for keys in (place, reads))
        with pytest.raises(RequestError, match=f"{path} does not read {wrong}, .*write {right}$"):
            check_body(path, body)


KEYS = st.text(min_size=1, max_size=6).filter(lambda key: "steermoe" not in key.lower())


@given(st.lists(KEYS, max_size=6).map(tuple), st.sampled_from(SPELLINGS), st.sampled_from([*READ_XARGS, *DROPS]))
def test_no_place_but_the_users_own_data_is_overlooked(place: tuple[str, ...], key: str, path: str) -> None:
    body = within((*place, key), "digits")
    own = ("content criteria data documents functions guided_json input json_schema output_config output_format prompt "
           "questions response_format schema state structured_outputs text tools")  # fmt: skip
    if any(part.strip().lower() in own.split() for part in place):
        check_body(path, body)
        return
    with pytest.raises(RequestError, match="does not read"):
        check_body(path, body)


@pytest.mark.parametrize("key", SPELLINGS)
def test_a_wrong_spelling_is_named_too(key: str) -> None:
    asking, user = {key: "digits"}, {"role": "user", "content": "Hi"}
    bodies: list[dict[str, Any]] = [
        asking,
        {"vllm_xargs": {"vllm_xargs": asking}},
        {"messages": [user, user | {"extra": asking}]},
        {"messages": [[user | asking]]},
    ]
    for body in bodies:
        with pytest.raises(RequestError, match=f"does not read .*{re.escape(key)}, .*write vllm_xargs.steermoe"):
            check_body("/v1/chat/completions/batch", body)


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


@pytest.mark.parametrize("path", [*READ_XARGS, TOKENS_IN, *DROPS])
def test_what_the_user_sends_as_data_is_never_refused(path: str) -> None:
    for key, value in USERS_OWN.items():
        check_body(path, {"model": "steermoe-lab", key: value})
        check_body(path, {"sampling_params": {key: value}})


def test_headers_and_query_parameters_are_not_read() -> None:
    for kind, names in (("header", ["content-type", "steermoe"]), ("query parameter", ["vllm_xargs[steermoe]"])):
        with pytest.raises(RequestError, match=rf"does not read the {kind} .*steermoe.*write vllm_xargs\.steermoe"):
            check_names("/v1/completions", kind, names)
    check_names("/v1/completions", "header", ["content-type", "user-agent", "x-steermoe-lab", "cookie"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
)


@given(JSON, st.sampled_from([*READ_XARGS, *DROPS, TOKENS_IN]))
def test_other_bodies_are_none_of_our_business(body: object, path: str) -> None:
    check_body(path, body)
    check_beams(path, body)


def test_beam_search_drops_it_however_a_boolean_is_written() -> None:
    for asked, beams in (
        (True, True),
        (1, True),
        ("yes", True),
        (False, False),
        ("false", False),
        (None, False),
        (0, False),
    ):
        assert has_beams({"use_beam_search": asked}) is beams
        if beams:
            with pytest.raises(RequestError, match="beam search"):
                check_beams("/v1/completions", ASKING | {"use_beam_search": asked})
        check_beams("/v1/completions", (ASKING if not beams else {}) | {"use_beam_search": asked})
    assert not has_beams(["use_beam_search"]) and not has_beams({})


def test_a_key_that_cannot_be_written_is_shown_as_far_as_it_can() -> None:
    with pytest.raises(RequestError) as caught:
        check_body("/v1/completions", {"half \ud800": {"a" * 1000 + "\n": {"steermoe": "digits"}}})
    assert "half ?.aaa" in str(caught.value) and len(str(caught.value).encode()) < 500


def test_a_body_may_be_as_deep_as_json_can_be() -> None:
    with pytest.raises(RequestError, match=r"does not read deeper\.deeper"):
        check_body("/v1/completions", within(("deeper",) * 5000 + ("steermoe",), "digits"))
