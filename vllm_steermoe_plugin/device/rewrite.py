"""The rewrite of router logits: the one function in which steering happens.

Axes: T tokens, E routed experts of one layer. Nothing here knows vLLM, requests
or profiles; a rule is +1 (activate), -1 (deactivate) or 0 (leave alone).
"""

from __future__ import annotations

import torch

EPSILON = 0.01
"""Margin in units of the logits (arXiv 2509.09660, algorithm 2)."""

_EXPONENT_BITS = 0x7F800000


def _power_of_two(x: torch.Tensor) -> torch.Tensor:
    """2**floor(log2 |x|) of float32 values; 0 at 0. Times `eps` of a dtype it is that dtype's spacing at `x`."""
    return (x.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)


def apply_rules(
    logits: torch.Tensor, rules: torch.Tensor, *, log_softmax: bool = False, bfloat16: bool = False
) -> torch.Tensor:
    """Rewrite router logits so that the model's own top-k obeys `rules`.

    Args:
        logits: router logits `[T, E]`, any floating dtype.
        rules: int8 `[T, E]` (or `[E]`, for all tokens) with values in {-1, 0, +1}.
        log_softmax: whether all logits of a row with a rule become log-probabilities first, as the paper has it. For
            a softmax that is a shift, which cancels; for a router that looks at |z| it is not.
        bfloat16: whether who selects rounds the logits to bfloat16 before, so that the margin must be a unit of that.

    Returns:
        A new tensor `[T, E]` in the dtype of `logits`. Rows without a rule are the input, bit for bit. In every other
        row, with z its logits in float32 (or their log-softmax), activated experts get `max(z) + EPSILON`, deactivated
        ones `min(z) - EPSILON`; all others keep their bits (their log-softmax is rounded to the dtype). Where EPSILON
        is smaller than one unit in the last place of that dtype, the margin is that unit, so that activated experts
        stay strictly above all others and deactivated ones strictly below. (A row that already holds -inf has no room
        below it: there a deactivated expert becomes -inf too.) A row with a rule that holds +inf or NaN, or nothing
        but -inf, becomes NaN throughout: a model that broke down is not made to look sound.

    Source: arXiv 2509.09660, algorithm 2, but for a shift; the strictness in low precision is ours.
    """
    dtype = logits.dtype
    coarse = torch.bfloat16 if bfloat16 else dtype
    unit = torch.finfo(coarse).eps
    scores = others = logits
    if log_softmax:
        scores = torch.log_softmax(logits.float(), dim=-1)
        others = torch.where(rules.any(dim=-1, keepdim=True), scores.to(dtype), logits)
    low, high = (end.float() for end in scores.aminmax(dim=-1, keepdim=True))
    # Both factors of `unit * power` are powers of two, so nothing is rounded before the sum.
    is_rounded = log_softmax or bfloat16
    high_rounded, low_rounded = (high.to(coarse).float(), low.to(coarse).float()) if is_rounded else (high, low)
    above = torch.maximum(high + EPSILON, high_rounded.add(_power_of_two(high_rounded), alpha=unit))
    below = torch.minimum(low - EPSILON, low_rounded.sub(_power_of_two(low_rounded), alpha=unit))
    steered = torch.where(rules > 0, above.to(dtype), torch.where(rules < 0, below.to(dtype), others))
    sound = high.isfinite()
    if not sound.all():
        steered = torch.where(sound | ~rules.any(dim=-1, keepdim=True), steered, torch.nan)
    return steered
