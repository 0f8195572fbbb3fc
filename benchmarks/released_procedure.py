"""The procedure of the released code, written anew from its description, to measure against.

One text at a time through the engine; each layer's router logits go to a .npy file; the files are read back, and a
Python loop counts the top-k of each counted token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams

from vllm_steermoe_plugin.spans import TokenSpan

GATE = "GateLinear"


class LogitsDump:
    """Forward hooks on every gate that write its logits `[T, E]` to `layer.npy`."""

    def __init__(self, engine: LLM, folder: Path) -> None:
        self._folder = folder
        self._handles: list[Any] = []
        engine.apply_model(self._attach)

    def _attach(self, model: Any) -> int:
        gates = [module for module in model.modules() if type(module).__name__.endswith(GATE)]
        for layer, gate in enumerate(gates):

            def hook(module: Any, args: Any, output: Any, layer: int = layer) -> None:
                logits = output[0] if isinstance(output, tuple) else output
                np.save(self._folder / f"{layer}.npy", logits.float().cpu().numpy())

            self._handles.append(gate.register_forward_hook(hook))
        return len(gates)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def prefill_one(engine: LLM, token_ids: list[int]) -> None:
    """One text alone; one token must be generated."""
    prompt: Any = {"prompt_token_ids": token_ids}
    engine.generate([prompt], SamplingParams(max_tokens=1, temperature=0.0), use_tqdm=False)


def count_one_at_a_time(
    engine: LLM, texts: Sequence[tuple[int, TokenSpan]], layers: int, experts: int, top_k: int, folder: Path
) -> tuple[np.ndarray, list[int]]:
    """Selections `[2, L, E]` and tokens of both sides; `texts` are (side, tokens)."""
    counts = np.zeros((2, layers, experts), dtype=np.int64)
    tokens = [0, 0]
    dump = LogitsDump(engine, folder)
    try:
        for side, span in texts:
            prefill_one(engine, list(span.token_ids))
            counted = [position for start, stop in span.ranges for position in range(start, stop)]
            tokens[side - 1] += len(counted)
            for layer in range(layers):
                logits = np.load(folder / f"{layer}.npy")
                for position in counted:
                    for expert in np.argsort(-logits[position], kind="stable")[:top_k]:
                        counts[side - 1, layer, expert] += 1
    finally:
        dump.remove()
    return counts, tokens
