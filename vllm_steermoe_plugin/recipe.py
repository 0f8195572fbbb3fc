"""What a recipe gives: pairs, what they detect, and how they should be counted."""

from __future__ import annotations

from dataclasses import dataclass

from expert_registry import Recommended
from vllm_steermoe_plugin.behaviour import Behaviour
from vllm_steermoe_plugin.pairs import PairSet

Line = dict[str, object]
"""A line of a file of pairs, parsed."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Pairs and what they detect; `balance` as in `DetectionOptions`."""

    pairs: PairSet
    behaviour: Behaviour
    balance: bool = False


def described(
    name: str, sides: tuple[str, str], recommended: Recommended, license: str, note: str, *, safety: bool = False
) -> Behaviour:
    """A behaviour for the card."""
    return Behaviour(name, sides, safety, recommended, license, note)
