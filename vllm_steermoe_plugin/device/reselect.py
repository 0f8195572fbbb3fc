"""The correction of a router's selection: steering where the order of selection is not that of the logits.

vLLM selects first, from untouched logits; then the experts and weights of tokens with a rule are put right, by
precedence and not by numbers, so that no bias, group limit or saturated score can keep a rule from holding.

Axes: T tokens, E routed experts of one layer, K top-k, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vllm_steermoe_plugin.device.rewrite import EPSILON
from vllm_steermoe_plugin.device.router_kind import RouterKind, Score
from vllm_steermoe_plugin.steering.rule_values import FORCED, OWN_WEIGHT

NO_SUM = 1e-20
"""Added to a sum of weights, so that a row of scores that all underflow gets weights of 0. vLLM's kernel does so."""
_ROWS = 256
"""That are corrected at a time: what is made of them stays in a processor's cache."""


def reselect(
    weights: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    rules: torch.Tensor,
    kind: RouterKind,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Correct a router's selection so that it obeys `rules`.

    Args:
        weights: float `[T, K]`, what vLLM's router computed.
        ids: integers `[T, K]`, likewise: the model's own choice S0.
        logits: router logits `[T, E]`, any floating dtype, as that router got them.
        bias: `[E]`, the router's correction bias b, if it has one.
        rules: float16 `[T, E]`, of which those that force are applied; biases are in the logits by then.
        kind: of the router.

    Returns:
        New `weights` and `ids`. With c = score(z) + b in float32, S' is the first K experts by (tier, c), where
        activated ones have tier 3, S0 has 2, other experts of the groups that the unsteered c keeps 1, the rest 0 and
        deactivated ones -1; equal c are ordered by index. Their weights are score(z'), divided by their sum and scaled
        as the router does, where z' is z, but max(z over S0) + EPSILON for activated experts (unless `OWN_WEIGHT`) and
        min(z) - EPSILON for deactivated ones. A row with nothing activated and nothing of S0 deactivated is the input,
        bit for bit. A row with such a rule that holds +inf or NaN, or nothing but -inf, gets NaN weights.

    The margin is arXiv 2509.09660's, algorithm 2, which knows softmax routers alone; max over S0, not over all E,
    keeps an activated expert's weight within what the model itself mixes. The rest is ours.
    """
    chosen = torch.zeros_like(rules, dtype=torch.bool).scatter_(1, ids.long().clamp(min=0), True)
    sound = logits.amax(dim=1).isfinite()
    changed = ((rules > FORCED) | ((rules < -FORCED) & chosen)).any(dim=1) & sound
    new_weights, new_ids = weights.clone(), ids.to(torch.int64, copy=True)
    if not sound.all():
        new_weights[~sound & (rules.abs() > FORCED).any(dim=1)] = torch.nan
    for rows in _pieces(changed):
        found, first = _steered(logits[rows].float(), chosen[rows], rules[rows], bias, kind, ids.shape[1])
        new_weights[rows], new_ids[rows] = found.to(weights.dtype), first
    return new_weights, new_ids.to(ids.dtype)


def _pieces(changed: torch.Tensor) -> Iterator[slice | torch.Tensor]:
    """Indices of the rows that are true in `changed [T]`, `_ROWS` at a time."""
    at = None if changed.all() else changed.nonzero()[:, 0]
    for start in range(0, len(changed if at is None else at), _ROWS):
        piece = slice(start, start + _ROWS)
        yield piece if at is None else at[piece]


def _steered(
    z: torch.Tensor, chosen: torch.Tensor, rules: torch.Tensor, bias: torch.Tensor | None, kind: RouterKind, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids `[T, K]`; `chosen` is S0 as bool `[T, E]`."""
    activated, deactivated = rules > FORCED, rules < -FORCED
    c = corrected(z, bias, kind)
    tier = torch.where(chosen, 2, in_kept_groups(c, kind).long())
    tier = torch.where(activated, 3, torch.where(deactivated, -1, tier))
    ids = _first(top_k, tier, c)
    top = z.masked_fill(~chosen, -torch.inf).amax(dim=1, keepdim=True)
    z_new = torch.where(deactivated, z.amin(dim=1, keepdim=True) - EPSILON, z)
    z_new = torch.where(activated & (rules != OWN_WEIGHT), top + EPSILON, z_new)
    return weigh(z_new, ids, kind), ids


def select(
    logits: torch.Tensor, bias: torch.Tensor | None, kind: RouterKind, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a router of this kind makes of `logits [T, E]`, from scratch: weights float32 and ids int64 `[T, K]`."""
    z = logits.float()
    c = corrected(z, bias, kind)
    ids = _first(top_k, in_kept_groups(c, kind).long(), c)
    return weigh(z, ids, kind), ids


def weigh(z: torch.Tensor, ids: torch.Tensor, kind: RouterKind) -> torch.Tensor:
    """Weights `[T, K]` of the experts `ids [T, K]` under logits `z [T, E]`."""
    weights = score(z, kind.score).gather(1, ids)
    if kind.renormalize:
        weights = weights / (weights.sum(dim=1, keepdim=True) + NO_SUM)
    return weights * kind.scale


def _first(top_k: int, tier: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The first K experts by (tier, c); of equal ones that with the lower index.

    One partial sort, of an integer that holds all three: for a float's bits, as integers, are in its order.
    """
    num_experts = c.shape[1]
    bits = (c + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = ((tier << 32) + ordered) * num_experts - torch.arange(num_experts, device=c.device)
    return key.topk(top_k, dim=1).indices


def score(z: torch.Tensor, kind: Score) -> torch.Tensor:
    """u of logits `[..., E]`."""
    if kind == "softmax":
        return z.softmax(dim=-1)
    return z.sigmoid() if kind == "sigmoid" else torch.nn.functional.softplus(z).sqrt()


def corrected(z: torch.Tensor, bias: torch.Tensor | None, kind: RouterKind) -> torch.Tensor:
    """c `[T, E]` of float32 logits."""
    u = score(z, kind.score)
    return u if bias is None else u + bias.float()


def group_scores(c: torch.Tensor, kind: RouterKind) -> torch.Tensor:
    """What the router orders groups by, `[T, G]`."""
    grouped = c.view(len(c), kind.groups, c.shape[1] // kind.groups)
    if not kind.bias:
        return grouped.amax(dim=2)
    largest, at = grouped.max(dim=2, keepdim=True)
    return (largest + grouped.scatter(2, at, -torch.inf).amax(dim=2, keepdim=True))[:, :, 0]


def in_kept_groups(c: torch.Tensor, kind: RouterKind) -> torch.Tensor:
    """Whether an expert is in a group from which the router selects, bool `[T, E]`."""
    if kind.groups == kind.kept:
        return torch.ones_like(c, dtype=torch.bool)
    best = group_scores(c, kind)
    first = best.sort(dim=1, descending=True, stable=True).indices[:, : kind.kept]
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, first, True)
    return kept[:, :, None].expand(-1, -1, c.shape[1] // kind.groups).reshape(c.shape)
