"""What detection asks an engine for, and which counts of its workers are refused; the engine is a stand-in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from expert_registry.errors import EngineError
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.detection.engine_client import sent, take_counts
from vllm_steermoe_plugin.detection.pair_counting import take_pairs
from vllm_steermoe_plugin.detection.token_spans import TokenSpan
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans
from vllm_steermoe_plugin.steering.request import NONE
from vllm_steermoe_plugin.steering.wire import STEER_KEY


def answer(*tokens: int, selected: int = 0) -> dict[str, Any]:
    """A worker's, of one layer with four experts."""
    selections = np.full((len(tokens), 1, 4), selected, "<i4").tobytes()
    return {"layers": [0], "shape": [len(tokens), 1, 4], "selections": selections, "tokens": tokens}


def test_workers_that_counted_a_layer_differently_are_refused() -> None:
    engine: Any = SimpleNamespace(collective_rpc=lambda method: [answer(1), answer(1, selected=1)])
    with pytest.raises(EngineError, match="layer 0 differently"):
        take_counts(engine, (0,))


@pytest.mark.parametrize(
    ("tokens", "said"),
    [((1, 2, 0), "2 tokens .* group 2 instead of 1"), ((1, 1, 2), "2 tokens .* group 3 instead of 0")],
)
def test_tokens_that_something_else_counts_are_noticed(tokens: tuple[int, ...], said: str) -> None:
    engine: Any = SimpleNamespace(
        collective_rpc=lambda method: [answer(*tokens)], wait_for_completion=lambda use_tqdm: None
    )
    span = TokenSpan((5,), ((0, 1),))
    with pytest.raises(EngineError, match=said):
        take_pairs(engine, MoEShape("OlmoeForCausalLM", (0,), 4, 2), [(0, span, span)])


def test_counted_texts_are_not_steered_where_there_is_a_default() -> None:
    asked: list[Any] = []
    engine: Any = SimpleNamespace(
        enqueue=lambda prompts, params, use_tqdm: asked.extend(params), llm_engine=SimpleNamespace(abort_request=None)
    )
    with sent(engine, [([5], CountedSpans(1, ((0, 1),)))]):
        assert [params.extra_args[STEER_KEY] for params in asked] == [NONE]
