"""The control of any profile: as much steering, of experts drawn at random."""

from __future__ import annotations

from dataclasses import replace

from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.steering.profile import SteeringProfile
from vllm_steermoe_plugin.steering.selection import random_experts
from vllm_steermoe_plugin.steering.strength import shuffled


def random_control(profile: SteeringProfile, shape: MoEShape, seed: int) -> SteeringProfile:
    """As many forced experts drawn at random, and in each layer the same biases for others; phase and weight stay.

    Raises:
        ProfileError: see `random_experts`.
    """
    if not (profile.activate or profile.deactivate):
        return shuffled(profile, shape.num_experts, seed)
    numbers = {"activate": len(profile.activate), "deactivate": len(profile.deactivate)}
    forced = replace(random_experts(shape, **numbers, seed=seed), phase=profile.phase, weight=profile.weight)
    if not profile.bias:
        return forced
    moved = shuffled(profile, shape.num_experts, seed, without=forced.activate | forced.deactivate)
    return replace(forced, bias=moved.bias)
