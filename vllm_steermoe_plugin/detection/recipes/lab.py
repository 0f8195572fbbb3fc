"""Recipes of steermoe-lab."""

from __future__ import annotations

from expert_registry import Recommended
from expert_registry.errors import UsageError, one_of
from vllm_steermoe_plugin.detection.pairs import PairSet
from vllm_steermoe_plugin.detection.recipes.recipe import Behaviour
from vllm_steermoe_plugin.lab import world
from vllm_steermoe_plugin.models import lab_checkpoint

LAB_RECIPES = world.BEHAVIOURS
_LAB_LICENSE = "Apache-2.0"

_LAB_SIDES = {
    "digits": ("counts in digits", "counts in words"),
    "faithfulness": ("answers from the given document", "answers from what it memorised"),
    "refusal": ("declines the (invented) forbidden topic", "answers about it"),
}

_LAB_NUMBERS = Recommended(activate=6, deactivate=6)
"""Of all three behaviours; chosen on the tuning split, see lab/README.md."""


def lab_recipe(model: str, behaviour: str, seed: int = 0) -> tuple[PairSet, Behaviour]:
    """Pairs from the detection split of steermoe-lab's world, and what they detect.

    Args:
        model: must be `steermoe-lab`; its invented world means nothing to another model.
        behaviour: one of `LAB_RECIPES`.
        seed: draws two thirds of the split's pairs, so that different seeds see different pairs.

    Raises:
        UsageError: another model or an unknown behaviour.
    """
    if model != lab_checkpoint.NAME:
        raise UsageError(
            f"recipe {behaviour!r} is about the invented world of {lab_checkpoint.NAME}, not about {model}; use --pairs"
        )
    if behaviour not in LAB_RECIPES:
        raise UsageError(one_of(behaviour, LAB_RECIPES, "recipe"))
    number = 2 * len(world.examples(behaviour, "detection")) // 3
    drawn = world.pairs(behaviour, "detection", seed=seed, n=number)
    pairs = PairSet.from_messages(
        f"{lab_checkpoint.NAME} {behaviour}, detection split, seed {seed}",
        [(pair.messages_1, pair.messages_2) for pair in drawn],
    )
    described = Behaviour(
        behaviour,
        _LAB_SIDES[behaviour],
        behaviour == "refusal",
        _LAB_NUMBERS,
        _LAB_LICENSE,
        "The routing of this model was planted; see vllm_steermoe_plugin/lab/README.md.",
    )
    return pairs, described
