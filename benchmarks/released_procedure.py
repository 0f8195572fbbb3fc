"""The procedure of the released code, written anew from what it does, to measure against.

Per side of the pairs: one text at a time through the engine; each layer's router logits go to a .npy file, of which up
to 500 are removed before a text and looked for after it; the logits of all tokens of all texts are kept in half
precision and written to one file. Then both sides are read back, every token's probabilities and their order are
computed, and a Python loop over the counted tokens and the layers counts what is and what is not in the top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import LLM, SamplingParams

from vllm_steermoe_plugin.detection.token_spans import TokenSpan

GATE = "GateLinear"
MOST_LAYERS = 500


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
    engine: LLM, sides: Sequence[Sequence[TokenSpan]], top_k: int, folder: Path, kept_as: str = "float16"
) -> tuple[np.ndarray, list[int]]:
    """Selections int64 `[2, L, E]` and counted tokens of both sides.

    In half precision, as there, logits that differ little tie; `kept_as` float32 keeps them apart.
    """
    dump = LogitsDump(engine, folder)
    try:
        files = [
            _write_logits(engine, texts, folder, folder / f"side{n}.npz", kept_as) for n, texts in enumerate(sides)
        ]
    finally:
        dump.remove()
    counts, tokens = [], []
    for texts, file in zip(sides, files, strict=True):
        probabilities = _of_counted_tokens(texts, file)
        tokens.append(len(probabilities))
        counts.append(_selections(probabilities, top_k))
    return np.stack(counts), tokens


def _write_logits(engine: LLM, texts: Sequence[TokenSpan], folder: Path, file: Path, kept_as: str) -> Path:
    """Run the texts; write the logits `[L, T, E]` of each."""
    kept = []
    for text in texts:
        paths = [folder / f"{layer}.npy" for layer in range(MOST_LAYERS)]
        for path in paths:
            if path.exists():
                path.unlink()
        prefill_one(engine, list(text.token_ids))
        kept.append(np.stack([np.load(path).astype(kept_as) for path in paths if path.exists()]))
    np.savez(file, *kept)
    return file


def _of_counted_tokens(texts: Sequence[TokenSpan], file: Path) -> np.ndarray:
    """Probabilities `[N, L, E]` of the N counted tokens."""
    found = []
    with np.load(file) as kept:
        for number, text in enumerate(texts):
            probabilities = torch.softmax(torch.tensor(kept[f"arr_{number}"]), dim=-1).numpy()
            for start, stop in text.ranges:
                found += [probabilities[:, position] for position in range(start, stop)]
    return np.stack(found)


def _selections(probabilities: np.ndarray, top_k: int) -> np.ndarray:
    """How often each expert is in the top-k, int64 `[L, E]`; the rest is counted too, and must add up."""
    selected, left = (np.zeros(probabilities.shape[1:], dtype=np.int64) for _ in range(2))
    order = np.argsort(probabilities, axis=-1)
    for token in range(len(order)):
        for layer in range(order.shape[1]):
            selected[layer, order[token, layer, -top_k:]] += 1
            left[layer, order[token, layer, :-top_k]] += 1
    assert (selected + left == len(order)).all()
    return selected
