"""The engine's core takes what a front end has admitted, and keeps the blocks of counted requests apart."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from tests.support.front_ends import EXPERTS, SHAPE
from tests.support.refusals import as_said
from vllm_steermoe_plugin.core.block_keys import keep_apart
from vllm_steermoe_plugin.core.request_check import _preprocess
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans
from vllm_steermoe_plugin.steering.wire import CHECKED_KEY, COUNT_KEY, SHARED_KEY, STEER_KEY, STEERED

CHECKED: dict[str, object] = {CHECKED_KEY: True}
SPANS = CountedSpans(2, ((0, 3), (5, 6)))

MADE: dict[str, tuple[dict[str, object] | None, bool, bool]] = {
    "asks for nothing": (None, True, False),
    "other arguments": ({"other": 1, STEER_KEY: None}, True, False),
    "a name": ({STEER_KEY: "digits"}, False, False),
    "experts": ({STEER_KEY: EXPERTS}, False, False),
    "a mark as HTTP would have it": ({STEER_KEY: EXPERTS, CHECKED_KEY: 1}, False, False),
    "counted": ({COUNT_KEY: SPANS.to_json()}, False, False),
    "shared": ({SHARED_KEY: [0, "mine"]}, False, False),
    "prepared": ({STEER_KEY: EXPERTS, CHECKED_KEY: True}, True, True),
    "prepared, and not to be steered": (CHECKED, True, True),
}
"""Extra arguments of a request that was made elsewhere, and whether it may go on: without a default, and with one."""


def refused(call: Callable[..., object], *arguments: object) -> VLLMValidationError | None:
    try:
        call(*arguments)
    except VLLMValidationError as error:
        return error
    return None


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Exception | None, list[object]]]:
    """Gives a request to the engine's core: how that refuses it, and what vLLM's own part took before."""
    monkeypatch.setattr("vllm_steermoe_plugin.core.request_check.served_shape", lambda vllm_config: SHAPE)

    def give(
        args: object, default: str | None = None, salt: str | None = STEERED + "0" * 64, **fields: object
    ) -> tuple[Exception | None, list[object]]:
        taken: list[object] = []
        blocks = SimpleNamespace(block_hashes=[])
        config = SimpleNamespace(additional_config={"steermoe": {"default": default}})
        there = SimpleNamespace(scheduler=None, vllm_config=config)
        values = {"sampling_params": SimpleNamespace(extra_args=args), "abort_immediately": False, **fields}
        made = SimpleNamespace(request_id="7", cache_salt=salt, **values)
        return refused(_preprocess(lambda self, request: (blocks, taken.append(request))), there, made), taken

    return give


def test_the_engines_core_ends_an_unchecked_request_alone(core: Any) -> None:
    for name, (args, *may) in MADE.items():
        for default, goes_on in zip((None, "digits"), may, strict=True):
            error, taken = core(args, default)
            assert (
                error is None if goes_on else as_said(error, VLLMValidationError, r"request 7 .*not load the plugin")
            ), name
            assert len(taken) == 1, "what vLLM does for its caches is done in any case"
            for free in ({"sampling_params": None}, {"abort_immediately": True}):
                assert core(args, default, **free)[0] is None


def test_the_engines_core_reads_what_is_marked_as_checked_before_a_step_does(core: Any) -> None:
    for args, salt, words in (
        ({STEER_KEY: EXPERTS}, None, "has no salt of steering"),
        ({STEER_KEY: EXPERTS}, "mine", "has no salt of steering"),
        ({STEER_KEY: "digits"}, STEERED, "JSON"),
        ({STEER_KEY: '{"activate": {"99": [1]}}'}, STEERED, "layer 99 has no routed experts"),
        ({COUNT_KEY: "nothing"}, None, "JSON"),
    ):
        assert as_said(core(args | CHECKED, salt=salt)[0], VLLMValidationError, words), args


def test_a_counted_requests_blocks_are_its_own_from_its_first_counted_token_on() -> None:
    keys = [b"one", b"two", b"three"]

    def kept(first: int, own: str = "mine", blocks: list[bytes] = keys) -> list[bytes]:
        request = SimpleNamespace(block_hashes=list(blocks))
        keep_apart(request, {SHARED_KEY: [first, own]}, SimpleNamespace(hash_block_size=4))
        return request.block_hashes

    for first, shared in ((0, 0), (3, 0), (4, 1), (11, 2), (12, 3), (100, 3)):
        found = kept(first)
        assert [a == b for a, b in zip(found, keys, strict=True)] == [i < shared for i in range(3)]
        assert len(set(found)) == 3 and found == kept(first)
        assert all(a != b for a, b in zip(found[shared:], kept(first, "another's")[shared:], strict=True))
    for odd in (None, {}, {SHARED_KEY: "mine"}, {SHARED_KEY: [1]}, {SHARED_KEY: ["1", "mine"]}):
        request = SimpleNamespace(block_hashes=list(keys))
        keep_apart(request, odd, None)
        assert request.block_hashes == keys
    keep_apart(SimpleNamespace(block_hashes=[]), {SHARED_KEY: [0, "mine"]}, None)
