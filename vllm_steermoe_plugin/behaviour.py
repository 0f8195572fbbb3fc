"""What a detection is about."""

from __future__ import annotations

from dataclasses import dataclass

from expert_registry import Recommended


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What is being detected, for the ranking's card."""

    name: str
    sides: tuple[str, str]
    safety: bool
    recommended: Recommended
    license: str = "unspecified"
    note: str = ""
    version: int = 1
