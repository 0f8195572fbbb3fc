"""Bodies that ask for steering where vLLM drops it. That a real server refuses them: test_serve_http.py."""

from __future__ import annotations

from typing import Any

import pytest

from expert_registry.errors import RequestError
from vllm_steermoe_plugin.http_bodies import READ_XARGS, check_body

ASKING = {"model": "m", "vllm_xargs": {"steermoe": "digits"}}


@pytest.mark.parametrize("prefix", ["", "/api"])
@pytest.mark.parametrize("path", [*READ_XARGS, "/v1/chat/completions/render", "/tokenize", "/v1/messages/count_tokens"])
def test_where_it_is_read_or_nothing_is_generated_it_is_let_in(path: str, prefix: str) -> None:
    check_body(prefix + path, ASKING)


DROPS = ("/generative_scoring", "/v1/systemone", "/cohere/v2/chat", "/cohere/v2/chat/render", "/inference/v1/generate")
POOLS = ("/v1/embeddings", "/pooling", "/v1/score")


@pytest.mark.parametrize("path", [*DROPS, *POOLS, "/a/new/one"])
def test_an_endpoint_that_drops_it_is_named(path: str) -> None:
    with pytest.raises(RequestError, match=f"{path} does not read vllm_xargs.*/v1/chat/completions"):
        check_body(path, ASKING)
    check_body(path, {"model": "m", "vllm_xargs": {"session_id": "1"}})


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"steermoe": "digits"}, "steermoe"),
        ({"extra_body": {"steermoe": "digits"}}, "extra_body.steermoe"),
        ({"extra_body": ASKING}, "extra_body.vllm_xargs.steermoe"),
        ({"extra_args": {"steermoe": "digits"}}, "extra_args.steermoe"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generative_scoring"])
def test_a_wrong_place_in_the_body_is_named(path: str, body: dict[str, Any], place: str) -> None:
    with pytest.raises(RequestError, match=f"not read {place}, .*write vllm_xargs.steermoe"):
        check_body(path, body)


@pytest.mark.parametrize(
    "body",
    [None, 3, [], ["steermoe"], {}, {"vllm_xargs": None}, {"vllm_xargs": ["steermoe"]}, {"extra_body": "steermoe"}],
)
def test_other_bodies_are_none_of_our_business(body: object) -> None:
    check_body("/generative_scoring", body)
