"""What a recipe gives: pairs, what they detect, and how they should be counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from expert_registry import Recommended
from vllm_steermoe_plugin.detection.pairs import PairSet

Line = dict[str, object]
"""A line of a file of pairs, parsed."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Pairs and what they detect; `balance` as in `DetectionOptions`."""

    pairs: PairSet
    behaviour: Behaviour
    balance: bool = False


@dataclass(frozen=True, slots=True)
class PairSampling:
    """Which pairs of a recipe are taken.

    Attributes:
        seed: order and choice.
        limit: at most so many, the first ones in that order.
        data_file: rows to take instead of the data set's on the hub, with the same columns.
        skip_bad: leave out rows that make no pair and should, instead of stopping.
    """

    seed: int = 0
    limit: int | None = None
    data_file: Path | None = None
    skip_bad: bool = False


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What is being detected, for the ranking card."""

    name: str
    sides: tuple[str, str]
    safety: bool
    recommended: Recommended
    license: str = "unspecified"
    note: str = ""
    version: int = 1
