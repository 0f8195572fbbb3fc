"""Errors of evaluating and comparing."""

from __future__ import annotations

from expert_registry.errors import SteerMoEError


class ComparisonError(SteerMoEError):
    """Runs do not pair, or a file holds no run."""

    code = "STEERMOE-E501"


class JudgeError(SteerMoEError):
    """A judge cannot be reached, or answers what cannot be read."""

    code = "STEERMOE-E502"
