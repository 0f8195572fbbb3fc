"""The rewrite of router logits: the one function in which steering happens, where logits decide.

Axes: T tokens, E routed experts of one layer. Nothing here knows vLLM, requests or profiles; rules are the numbers of
`steering/rule_values.py`.
"""

from __future__ import annotations

import torch

from vllm_steermoe_plugin.steering.rule_values import ACTIVATE, DEACTIVATE, FORCED

EPSILON = 0.01
"""Margin in units of the logits (arXiv 2509.09660, algorithm 2)."""

_EXPONENT_BITS = 0x7F800000


def _power_of_two(x: torch.Tensor) -> torch.Tensor:
    """2**floor(log2 |x|) of float32 values; 0 at 0. Times `eps` of a dtype it is that dtype's spacing at `x`."""
    return (x.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)


def forcing(signs: torch.Tensor) -> torch.Tensor:
    """Rules, float16, that activate where `signs` are above 0 and deactivate where they are below."""
    return torch.where(signs > 0, ACTIVATE, torch.where(signs < 0, DEACTIVATE, 0.0)).half()


def apply_biases(logits: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """Add to router logits `[T, E]` as many standard deviations as `biases [T, E]` says; a bias of 0 leaves the bits.

    `z + x * sigma` in float32, with sigma the population standard deviation of the row's own logits, those at -inf
    left out: a token's result must not hang on its neighbours in the batch. The logits of a row that holds +inf or NaN
    become NaN where they have a bias.
    """
    z = logits.float()
    known = z > -torch.inf
    number = known.sum(dim=-1, keepdim=True)
    mean = torch.where(known, z, 0).sum(dim=-1, keepdim=True) / number
    sigma = torch.where(known, z - mean, 0).square().sum(dim=-1, keepdim=True).div(number).sqrt()
    return torch.where(biases != 0, (z + biases * sigma).to(logits.dtype), logits)


def apply_rules(
    logits: torch.Tensor,
    rules: torch.Tensor,
    *,
    log_softmax: bool = False,
    bfloat16: bool = False,
    biases: bool = True,
    forces: bool = True,
) -> torch.Tensor:
    """Rewrite router logits: add their biases, then make the model's own top-k obey the rules that force.

    Args:
        logits: router logits `[T, E]`, any floating dtype.
        rules: float16 `[T, E]` (or `[E]`, for all tokens).
        log_softmax: whether all logits of a row with a rule that forces become log-probabilities first, as the paper
            has it. For a softmax that is a shift, which cancels; for a router that looks at |z| it is not.
        bfloat16: whether who selects rounds the logits to bfloat16 before, so that the margin must be a unit of that.
        biases: whether there may be biases among the rules; if not, nothing is computed for them.
        forces: whether rules that force are applied; if not, they are as 0.

    Returns:
        A new tensor `[T, E]` in the dtype of `logits`. Rows without a rule are the input, bit for bit. In every other
        row biases come first (`apply_biases`). Then, with z its logits in float32 (or their log-softmax), activated
        experts get `max(z) + EPSILON`, deactivated ones `min(z) - EPSILON`; all others keep their bits (their
        log-softmax is rounded to the dtype). Where EPSILON is smaller than one unit in the last place of that dtype,
        the margin is that unit, so that activated experts stay strictly above all others and deactivated ones strictly
        below. (A row that already holds -inf has no room below it: there a deactivated expert becomes -inf too.) A row
        with a rule that holds +inf or NaN, or nothing but -inf, becomes NaN throughout: a model that broke down is not
        made to look sound.

    Source: arXiv 2509.09660, algorithm 2, but for a shift; the strictness in low precision is ours. The form of the
    bias is arXiv 2604.27818's, whose sigma is that of a whole batch.
    """
    dtype = logits.dtype
    force = ruled = rules
    if biases:
        forced = rules.abs() > FORCED
        bias = rules.masked_fill(forced, 0)
        logits = apply_biases(logits, bias.float())
        force, ruled = (rules.masked_fill(~forced, 0), rules) if forces else (torch.zeros_like(rules), bias)
    coarse = torch.bfloat16 if bfloat16 else dtype
    unit = torch.finfo(coarse).eps
    scores = others = logits
    if log_softmax:
        scores = torch.log_softmax(logits.float(), dim=-1)
        others = torch.where(force.any(dim=-1, keepdim=True), scores.to(dtype), logits)
    low, high = (end.float() for end in scores.aminmax(dim=-1, keepdim=True))
    # Both factors of `unit * power` are powers of two, so nothing is rounded before the sum.
    is_rounded = log_softmax or bfloat16
    high_rounded, low_rounded = (high.to(coarse).float(), low.to(coarse).float()) if is_rounded else (high, low)
    above = torch.maximum(high + EPSILON, high_rounded.add(_power_of_two(high_rounded), alpha=unit))
    below = torch.minimum(low - EPSILON, low_rounded.sub(_power_of_two(low_rounded), alpha=unit))
    steered = torch.where(force > 0, above.to(dtype), torch.where(force < 0, below.to(dtype), others))
    sound = high.isfinite()
    if not sound.all():
        steered = torch.where(sound | ~ruled.any(dim=-1, keepdim=True), steered, torch.nan)
    return steered
