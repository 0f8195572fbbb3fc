"""Biases of a profile: what is added to an expert's router logit, in standard deviations of a token's own logits.

A bias is a number of half precision, since that is what the device holds, so equal steering has equal texts.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from expert_registry.errors import ProfileError
from expert_registry.weights import MAX_WEIGHT

Bias = tuple[int, int, float]
"""Layer, expert and the bias, in standard deviations."""
MAX_BIAS = MAX_WEIGHT
"""Largest absolute bias. Among 1024 logits none is further than 32 standard deviations above their mean."""


def canonical(biases: Iterable[Bias], without: frozenset[tuple[int, int]] = frozenset()) -> tuple[Bias, ...]:
    """Add up biases of the same expert; sorted, rounded to half precision, those that round to 0 left out.

    Args:
        biases: in any order.
        without: layers and experts that are forced in or out, which a bias does not change.

    Raises:
        ProfileError: one is beyond `MAX_BIAS`, infinite or NaN.
    """
    sums: dict[tuple[int, int], float] = {}
    for layer, expert, bias in biases:
        sums[layer, expert] = sums.get((layer, expert), 0.0) + bias
    for (layer, expert), bias in sums.items():
        if not abs(bias) <= MAX_BIAS:
            raise ProfileError(
                f"bias: {bias:g} for layer {layer}, expert {expert}; a bias is from -{MAX_BIAS:g} to {MAX_BIAS:g} "
                "standard deviations of a token's router logits"
            )
    cells = sorted(sums.keys() - without)
    # The shortest decimals that give the number back.
    halves = np.array([sums[cell] for cell in cells], dtype=np.float16).astype(str)
    return tuple(
        (layer, expert, float(text))
        for (layer, expert), text in zip(cells, halves.tolist(), strict=True)
        if float(text)
    )


def by_layer(biases: Iterable[Bias]) -> dict[str, dict[str, float]]:
    """As in a profile's JSON: experts and their biases by layer."""
    layers: dict[str, dict[str, float]] = {}
    for layer, expert, bias in biases:
        layers.setdefault(str(layer), {})[str(expert)] = bias
    return layers
