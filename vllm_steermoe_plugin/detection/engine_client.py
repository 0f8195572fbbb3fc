"""The routing counts of an engine, put together from its workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from expert_registry.errors import EngineError
from vllm_steermoe_plugin.settings import read_settings
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans
from vllm_steermoe_plugin.steering.request import NONE
from vllm_steermoe_plugin.steering.wire import COUNT_KEY, STEER_KEY

if TYPE_CHECKING:
    from vllm import LLM


def count_groups(engine: LLM) -> int:
    """How many groups of tokens an engine counts; 0 if none."""
    settings = read_settings(engine.llm_engine.vllm_config.additional_config)
    return settings.count_groups if settings.enabled else 0


def take_counts(engine: LLM, layers: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Selections int64 `[G, L, E]` and counted tokens int64 `[G]`; counting starts anew.

    Raises:
        EngineError: workers disagree, or one of `layers` was counted by none.
    """
    rows: dict[int, NDArray[np.int64]] = {}
    tokens: NDArray[np.int64] | None = None
    for part in engine.collective_rpc("steermoe_take_counts"):
        selections = np.frombuffer(part["selections"], "<i4").reshape(part["shape"]).astype(np.int64)
        mine = np.asarray(part["tokens"], dtype=np.int64)
        tokens = mine if tokens is None else tokens
        if not np.array_equal(tokens, mine):
            raise EngineError(f"workers counted different numbers of tokens: {tokens.tolist()} and {mine.tolist()}")
        for row, layer in enumerate(part["layers"]):
            counted = rows.setdefault(layer, selections[:, row])
            if not np.array_equal(counted, selections[:, row]):
                raise EngineError(f"workers counted layer {layer} differently")
    missing = sorted(set(layers) - set(rows))
    if missing or tokens is None:
        raise EngineError(f"no worker counted layers {missing}: they have no routed experts that are bound")
    return np.stack([rows[layer] for layer in layers], axis=1), tokens


def routers(engine: LLM) -> list[str]:
    """What the routers of an engine's model do and where they are steered, in words."""
    return sorted({router for status in engine.collective_rpc("steermoe_status") for router in status["routers"]})


COUNT_GROUPS = 256
"""Setting `count_groups` of an engine for detection: each text has its own group, so that a chunk of half as
many pairs is counted text by text. Enough texts to fill the engine's batches, few enough for little memory."""


@contextmanager
def sent(engine: LLM, texts: Sequence[tuple[Sequence[int], CountedSpans]]) -> Iterator[None]:
    """Hand token ids to the engine, to be counted as told; the one token that vLLM must generate is not counted.

    If the engine is another process, it begins. The block is to wait for it; what an exception or an interruption
    leaves in the engine is dropped, so that it is not counted by whoever comes next.
    """
    from vllm import SamplingParams

    prompts: list[Any] = [{"prompt_token_ids": list(token_ids)} for token_ids, _ in texts]
    params = [
        SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            # An engine may have a default; detection looks at the model's own routing.
            extra_args={COUNT_KEY: counted.to_json(), STEER_KEY: NONE},
        )
        for _, counted in texts
    ]
    if not prompts:
        yield
        return
    requests = engine.enqueue(prompts, params, use_tqdm=False)
    with ExitStack() as leaving:
        leaving.callback(engine.llm_engine.abort_request, requests, internal=True)
        yield
        leaving.pop_all()
