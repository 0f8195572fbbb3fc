"""In what two rankings differ."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from expert_registry.ranking import Ranking
from expert_registry.statistics import overlap
from expert_registry.weights import OwnWeights, own_weights


@dataclass(frozen=True, slots=True)
class Comparison:
    """Differences of two rankings."""

    card: dict[str, tuple[Any, Any]]
    """Field by field, the two values of what is not the same."""
    top: int
    """How many of the first experts were compared."""
    shared: int | None
    """How many of them both rankings have, with their sign; None if the shapes differ."""
    largest_change: tuple[int, int, float, float] | None
    """Layer, expert and the two risk differences where they are furthest apart; None if the shapes differ."""
    weights: tuple[OwnWeights | None, OwnWeights | None] | None
    """Of both rankings, where they are not the same."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_rankings(one: Ranking, two: Ranking, *, top: int) -> Comparison:
    """Compare the cards, weights, the first `top` experts and all risk differences of two rankings."""
    fields_1, fields_2 = one.card.model_dump(mode="json"), two.card.model_dump(mode="json")
    card = {name: (fields_1[name], fields_2[name]) for name in fields_1 if fields_1[name] != fields_2[name]}
    top = min(top, one.counts.activations_1.size)
    same = one.weights is two.weights or (
        one.weights is not None and two.weights is not None and np.array_equal(one.weights, two.weights)
    )
    weights = None if same else (own_weights(one), own_weights(two))
    if one.shape != two.shape:
        return Comparison(card, top, None, None, weights)
    before, after = one.counts.risk_difference(), two.counts.risk_difference()
    row, expert = np.unravel_index(int(np.argmax(np.abs(after - before))), before.shape)
    change = (one.shape.layers[int(row)], int(expert), float(before[row, expert]), float(after[row, expert]))
    return Comparison(card, top, round(overlap(one.counts, two.counts, top) * top), change, weights)
