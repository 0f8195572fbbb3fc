"""Start vLLM in this process with what detection and evaluation need, and read the routing counts back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from expert_registry.errors import EngineError
from vllm_steermoe_plugin import lab
from vllm_steermoe_plugin.checkpoints import resolve_checkpoint
from vllm_steermoe_plugin.plugin_names import check_plugin_allowed
from vllm_steermoe_plugin.settings import KEY, read_settings
from vllm_steermoe_plugin.worker import EXTENSION

if TYPE_CHECKING:
    from vllm import LLM

LAB_OPTIONS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 512,
    "enforce_eager": True,
    # Without an explicit size vLLM claims gigabytes for a model of a few megabytes and starts ten times slower.
    "kv_cache_memory_bytes": 256 << 20,
    "gpu_memory_utilization": 0.2,
}
"""Engine options that fit steermoe-lab on any machine."""


def engine_options(model: str, settings: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Arguments for `vllm.LLM`: the caller's, with the plugin's settings and worker methods added.

    Args:
        model: a hub id, a folder, or `steermoe-lab`.
        settings: the `steermoe` section of `additional_config`.
        options: any argument of `vllm.LLM`.
    """
    defaults = LAB_OPTIONS if model == lab.NAME else {}
    additional = dict(options.pop("additional_config", None) or {})
    additional[KEY] = {**additional.get(KEY, {}), **(settings or {})}
    return {
        "model": resolve_checkpoint(model),
        "worker_extension_cls": EXTENSION,
        **defaults,
        **options,
        "additional_config": additional,
    }


def start_engine(model: str, settings: dict[str, Any] | None = None, **options: Any) -> LLM:
    """Start an engine; see `engine_options`.

    Raises:
        EngineError: vLLM will not load the plugin.
    """
    check_plugin_allowed()
    from vllm import LLM

    return LLM(**engine_options(model, settings, **options))


def read_counts(engine: LLM, layers: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Selections int64 `[G, L, E]` and counted tokens int64 `[G]`, put together from all workers.

    Raises:
        EngineError: workers disagree, or one of `layers` was counted by none.
    """
    parts = engine.collective_rpc("steermoe_counts")
    return _together(((part, np.asarray(part["selections"], dtype=np.int64)) for part in parts), layers)


def take_counts(engine: LLM, layers: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Like `read_counts`, quick enough to be called often; counting starts anew."""
    parts = engine.collective_rpc("steermoe_take_counts")
    return _together(
        ((part, np.frombuffer(part["selections"], "<i4").reshape(part["shape"]).astype(np.int64)) for part in parts),
        layers,
    )


def count_groups(engine: LLM) -> int:
    """How many groups of tokens an engine counts; 0 if none."""
    settings = read_settings(engine.llm_engine.vllm_config.additional_config)
    return settings.count_groups if settings.enabled else 0


def _together(
    parts: Iterable[tuple[dict[str, Any], NDArray[np.int64]]], layers: tuple[int, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    rows: dict[int, NDArray[np.int64]] = {}
    tokens: NDArray[np.int64] | None = None
    for part, selections in parts:
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
