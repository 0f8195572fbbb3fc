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


def shuffled(profile: SteeringProfile, num_experts: int, seed: int) -> SteeringProfile:
    """The control of a biased profile: in each layer the same biases, for experts drawn at random.

    Their norm is the same in each layer, and so is their sum.
    """
    generator = np.random.default_rng(seed)
    rows: dict[int, list[float]] = {}
    for layer, _, bias in profile.bias:
        rows.setdefault(layer, []).append(bias)
    moved = [
        (layer, expert, bias)
        for layer, biases in rows.items()
        for expert, bias in zip(generator.permutation(num_experts).tolist(), biases, strict=False)
    ]
    return SteeringProfile(bias=tuple(moved), phase=profile.phase)
