"""Rankings made up for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expert_registry import DataRef, ModelRef, Ranking, RankingCard, Recommended, RoutingCounts


def make_ranking(
    seed: int = 0,
    *,
    model: str = "org/Tiny-MoE",
    architecture: str = "OlmoeForCausalLM",
    layers: tuple[int, ...] = (0, 1, 3),
    experts: int = 6,
    top_k: int = 2,
    tokens: tuple[int, int] = (40, 50),
    **card: Any,
) -> Ranking:
    """A ranking whose every counted token selected `top_k` random experts."""
    rng = np.random.default_rng(seed)
    sides = []
    for number in tokens:
        favour = rng.random((len(layers), 1, experts)) * 2
        order = np.argsort(rng.random((len(layers), number, experts)) + favour, axis=2)
        selected = (order[:, :, :top_k, None] == np.arange(experts)).sum(axis=(1, 2))
        sides.append(selected.astype(np.int64))
    counts = RoutingCounts(sides[0], sides[1], np.array(tokens, dtype=np.int64), np.array(layers, dtype=np.int64))
    fields: dict[str, Any] = {
        "model": ModelRef(id=model, architecture=architecture),
        "num_experts": experts,
        "top_k": top_k,
        "behaviour": "digits",
        "version": 1,
        "sides": ("with", "without"),
        "data": DataRef(name="made up"),
        "span": "all",
        "recommended": Recommended(activate=2, deactivate=2),
        "created": "2026-01-01",
        "license": "CC0-1.0",
    }
    return Ranking(counts, RankingCard(**fields | card))


def with_weights(ranking: Ranking, weights: NDArray[np.float32] | None = None, /, **card: Any) -> Ranking:
    """The same ranking with weights of its own: these, or random ones of which some are 0."""
    if weights is None:
        rng = np.random.default_rng(int(ranking.counts.activations_1.sum()))
        drawn = rng.uniform(-2, 2, ranking.counts.activations_1.shape)
        weights = np.where(np.abs(drawn) > 0.3, drawn, 0).astype(np.float32)
    fields = {"format_version": 2, "weights": "by hand"} | card
    return replace(ranking, weights=weights, card=ranking.card.model_copy(update=fields))
