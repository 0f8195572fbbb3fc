"""Logits that whoever selects rounds to bfloat16 first, and what must then still hold."""

from __future__ import annotations

import math

import torch


def _beside(power: float) -> list[float]:
    """Float32 numbers about a power of two: the next ones, and those that bfloat16 rounds to it and away from it."""
    at = torch.tensor(power)
    nearest = [float(torch.nextafter(at, torch.tensor(end))) for end in (-math.inf, math.inf)]
    unit = power * 2.0**-8
    return [power, *nearest, power - unit / 2, power - unit / 4, power + unit, power + unit * 1.001]


_ENDS = [sign * x for exponent in range(-8, 13) for x in _beside(2.0**exponent) for sign in (1, -1)]
OUTERMOST = torch.tensor(
    [[low, high, low, high, (low + high) / 2] for low in _ENDS[::5] for high in _ENDS if low < high]
)
"""Rows `[T, 5]` whose least and greatest logits are about a power of two; both occur twice."""


def is_strict_in_bfloat16(out: torch.Tensor, rules: torch.Tensor) -> bool:
    """Whether, rounded, all activated are above and all deactivated below all others, in rows that hold no NaN.

    Nothing is below -inf.
    """
    rounded = out.bfloat16().double()
    rows = zip(rounded.tolist(), rules.tolist(), rounded.isnan().any(dim=1).tolist(), strict=True)
    return all(_is_strict(row, rule) for row, rule, is_broken in rows if not is_broken)


def _is_strict(row: list[float], rule: list[int]) -> bool:
    activated = [z for z, r in zip(row, rule, strict=True) if r > 0]
    free = [z for z, r in zip(row, rule, strict=True) if r == 0]
    deactivated = [z for z, r in zip(row, rule, strict=True) if r < 0]
    above = min(activated, default=math.inf) > max([*free, *deactivated], default=-math.inf)
    least = min([*free, *activated], default=math.inf)
    return above and (max(deactivated, default=-math.inf) < least or least == -math.inf)
