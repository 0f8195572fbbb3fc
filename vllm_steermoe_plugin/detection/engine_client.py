"""The routing counts of an engine, put together from its workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from expert_registry.errors import EngineError
from vllm_steermoe_plugin.settings import read_settings

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
