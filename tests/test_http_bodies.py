"""Bodies that ask for steering where vLLM drops it. That a real server refuses them: test_serve_http.py."""

from __future__ import annotations

import re
from typing import Any

import pytest

from expert_registry.errors import RequestError
from vllm_steermoe_plugin.http_bodies import READ_XARGS, check_body

ASKING = {"model": "m", "vllm_xargs": {"steermoe": "digits"}}


@pytest.mark.parametrize("prefix", ["", "/api"])
@pytest.mark.parametrize("path", [*READ_XARGS, "/v1/chat/completions/render", "/tokenize", "/v1/messages/count_tokens"])
def test_where_it_is_read_or_nothing_is_generated_it_is_let_in(path: str, prefix: str) -> None:
    check_body(prefix + path, ASKING)


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
)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("path", "reads"),
    [("/v1/chat/completions", ("vllm_xargs",)), ("/v1/messages", ("vllm_xargs",)), (TOKENS_IN, PLACES[7])],
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


@pytest.mark.parametrize(
    "body",
    [None, 3, [], ["steermoe"], {}, {"vllm_xargs": None}, {"vllm_xargs": ["steermoe"]}, {"extra_body": "steermoe"}],
)
def test_other_bodies_are_none_of_our_business(body: object) -> None:
    check_body("/generative_scoring", body)
