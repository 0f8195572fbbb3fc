"""Biases from a ranking: the dial between no steering and a strong one. And its control, the same biases elsewhere."""

from __future__ import annotations

import numpy as np

from expert_registry.ranking import Ranking
from expert_registry.weights import Score, largest, weigh
from vllm_steermoe_plugin.steering.profile import Phase, SteeringProfile


def bias_experts(
    ranking: Ranking, strength: float, *, top: int | None = None, by: Score | None = None, phase: Phase = "both"
) -> SteeringProfile:
    """Give experts a bias of `strength` times their weight.

    Args:
        ranking: of the model to be steered.
        strength: in standard deviations of a token's router logits, for a weight of 1; negative to steer away from
            the behaviour. The profile of strength 0 is false.
        top: only that many, of the largest absolute weights; equal ones in the ranking's own order. None: all.
        by: what the weights are made of; see `weigh`.
        phase: the tokens to steer.

    Raises:
        ProfileError: the ranking has not that many experts with a weight, or none of its own, or a bias is out of
            bounds.
    """
    weights = weigh(ranking, by)
    layers, experts = largest(ranking, weights, top)
    rows = ranking.shape.layers
    biases = (strength * weights[layers, experts]).tolist()
    cells = zip(layers.tolist(), experts.tolist(), biases, strict=True)
    return SteeringProfile(bias=tuple((rows[row], expert, bias) for row, expert, bias in cells), phase=phase)


def shuffled(
    profile: SteeringProfile, num_experts: int, seed: int, without: frozenset[tuple[int, int]] = frozenset()
) -> SteeringProfile:
    """The control of a profile's biases: in each layer the same biases, for experts drawn at random.

    Their norm is the same in each layer, and so is their sum.

    Args:
        profile: with biases; what it forces is left out.
        num_experts: of a layer.
        seed: of the draw.
        without: layers and experts that are not drawn, because they are forced. Of more biases than a layer has other
            experts, the first are used.
    """
    generator = np.random.default_rng(seed)
    rows: dict[int, list[float]] = {}
    for layer, _, bias in profile.bias:
        rows.setdefault(layer, []).append(bias)
    moved = [
        (layer, expert, bias)
        for layer, biases in rows.items()
        for expert, bias in zip(_drawn(generator, layer, num_experts, without), biases, strict=False)
    ]
    return SteeringProfile(bias=tuple(moved), phase=profile.phase)


def _drawn(
    generator: np.random.Generator, layer: int, num_experts: int, without: frozenset[tuple[int, int]]
) -> list[int]:
    return [expert for expert in generator.permutation(num_experts).tolist() if (layer, expert) not in without]
