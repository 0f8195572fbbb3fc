"""Compile a profile for a model: the rule table that workers write to the device. No torch here.

Axes: L MoE layers, E routed experts, K experts per token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expert_registry.errors import ProfileError
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.steering.profile import Phase, SteeringProfile
from vllm_steermoe_plugin.steering.rule_values import ACTIVATE, BIASES, DEACTIVATE, FORCES, OWN_WEIGHT


@dataclass(frozen=True, slots=True, eq=False)
class RuleTable:
    """A compiled profile.

    Attributes:
        rules: float16 `[L, E]`, biases and values of `rule_values`; rows as `shape.layers`.
        does: uint8 `[L]`, what the rules of each row do: bits `FORCES` and `BIASES`.
        digest: of the profile; equal digests mean equal steering.
        phase: the tokens to which the rules apply.
    """

    rules: NDArray[np.float16]
    does: NDArray[np.uint8]
    digest: str
    phase: Phase


def check_rules(profile: SteeringProfile, shape: MoEShape) -> None:
    """Check a profile against a model's shape.

    Raises:
        ProfileError: a layer without routed experts, an expert out of range, more than K
            activated or more than E - K deactivated in one layer.
    """
    biased = {(layer, expert) for layer, expert, _ in profile.bias}
    rows, left = shape.rows, shape.num_experts - shape.top_k
    for verb, experts in (("activate", profile.activate), ("deactivate", profile.deactivate), ("bias", biased)):
        for layer, expert in sorted(experts):
            if layer not in rows:
                raise ProfileError(f"{verb}: layer {layer} has no routed experts; the model is {shape}")
            if not 0 <= expert < shape.num_experts:
                raise ProfileError(f"{verb}: layer {layer} has no expert {expert}; the model is {shape}")
    limits = (
        ("activate", profile.activate, shape.top_k, f"a token has only {shape.top_k} experts"),
        ("deactivate", profile.deactivate, left, f"{shape.top_k} of {shape.num_experts} must remain"),
    )
    for verb, forced, limit, reason in limits:
        for layer, count in Counter(layer for layer, _ in forced).items():
            if count > limit:
                raise ProfileError(f"{verb}: {count} experts in layer {layer}, but at most {limit}: {reason}")


def compile_rules(profile: SteeringProfile, shape: MoEShape) -> RuleTable:
    """Write a profile as a table for a model.

    Raises:
        ProfileError: it does not fit the model's shape (`check_rules`).
    """
    check_rules(profile, shape)
    rows = shape.rows
    rules = np.zeros((len(shape.layers), shape.num_experts), dtype=np.float16)
    does = np.zeros(len(shape.layers), dtype=np.uint8)
    activate = OWN_WEIGHT if profile.weight == "own" else ACTIVATE
    for experts, rule in ((profile.activate, activate), (profile.deactivate, DEACTIVATE)):
        for layer, expert in experts:
            rules[rows[layer], expert] = rule
            does[rows[layer]] |= FORCES
    for layer, expert, bias in profile.bias:
        rules[rows[layer], expert] = bias
        does[rows[layer]] |= BIASES
    return RuleTable(rules, does, profile.digest, profile.phase)
