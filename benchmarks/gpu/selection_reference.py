"""Routers and the correction of what they select in float64, for whole batches, written without the code under test."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_steermoe_plugin.device.router_kind import RouterKind

MARGIN, NO_SUM, OWN_WEIGHT = 0.01, 1e-20, 65504.0
NEAR = 2.0**-18
"""Difference that float32 and a GPU's exponentials may not tell, of two c: relative, for z of 4; of u + b, where u is
at most about 1, absolute. Exponentials below `_LEAST` may be nothing."""
_LEAST = 1e-18
WEIGHT_ERROR = 2e-5
"""Relative, of float32 weights."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What a router goes by, and selects.

    Attributes:
        c: `[T, E]`, in float64.
        near: `[T, E]`, how far from c it may be in float32.
        kept: `[T, E]`, whether the expert's group is.
        unsure: `[T]`, whether float32 may keep other groups.
        ids: `[T, K]`, S0.
    """

    c: torch.Tensor
    near: torch.Tensor
    kept: torch.Tensor
    unsure: torch.Tensor
    ids: torch.Tensor


def scores(z: torch.Tensor, kind: RouterKind) -> torch.Tensor:
    """u of float64 logits `[T, E]`."""
    if kind.score == "softmax":
        return torch.softmax(z, dim=1)
    return torch.sigmoid(z) if kind.score == "sigmoid" else torch.log1p(z.exp()).where(z < 30, z).sqrt()


def unsteered(logits: torch.Tensor, bias: torch.Tensor | None, kind: RouterKind, top_k: int) -> Selection:
    """What the router does by itself; of equals it takes that with the lower index."""
    z = logits.double()
    c = scores(z, kind)
    if bias is not None:
        c = c + bias.double()
    size = z.nan_to_num(0, 0, 0).abs().amax(dim=1, keepdim=True)
    near = NEAR * (1 + size / 4) * c.abs().clamp(min=_LEAST if bias is None else 1.0)
    groups = c.view(len(c), kind.groups, -1)
    best = groups.sort(dim=2, descending=True).values[:, :, : 2 if kind.bias else 1].sum(dim=2)
    order = best.argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros_like(best).scatter(1, order[:, : kind.kept], 1.0).bool()
    ordered = best.gather(1, order)
    unsure = torch.zeros(len(c), dtype=torch.bool, device=c.device)
    if kind.kept < kind.groups:
        gap = ordered[:, kind.kept - 1] - ordered[:, kind.kept]
        unsure = (gap != 0) & (gap < 4 * near.amax(dim=1))
    of_expert = kept.repeat_interleave(groups.shape[2], dim=1)
    ids = c.masked_fill(~of_expert, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :top_k]
    return Selection(c, near, of_expert, unsure, ids)


def fault(
    before: tuple[torch.Tensor, torch.Tensor],
    after: tuple[torch.Tensor, torch.Tensor],
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    rules: torch.Tensor,
    kind: RouterKind,
) -> str | None:
    """What is wrong with weights and ids `[T, K]` `after`, that were `before` and were to obey rules float16 `[T, E]`.

    Rows that need no change must be equal bit for bit. In the others, place by place, an expert must have the wanted
    one's precedence and its c but for rounding, or be that one where no two c are near but unequal; weights must be
    those of the experts found. Where float32 may keep other groups, the rules must hold and as much of S0 must stay.
    """
    weights, ids = (of.cpu() for of in after)
    logits, rules = logits.cpu(), rules.cpu()
    rules = rules.where(rules.abs() >= OWN_WEIGHT, 0)
    bias = None if bias is None else bias.cpu()
    old_weights, old_ids = (of.cpu() for of in before)
    chosen = torch.zeros_like(rules, dtype=torch.bool).scatter(1, old_ids.long(), True)
    sound = logits.double().amax(dim=1).isfinite()
    broken = ~sound & (rules != 0).any(dim=1)
    changed = sound & ((rules > 0) | ((rules < 0) & chosen)).any(dim=1)
    kept = ~changed & ~broken
    if not torch.equal(ids[~changed], old_ids[~changed]) or not torch.equal(weights[kept], old_weights[kept]):
        return "a row that needs no change was changed"
    if not weights[broken].isnan().all():
        return "a broken row has sound weights"
    if not changed.any():
        return None
    logits, chosen, rules = logits[changed], chosen[changed], rules[changed]
    found = ids[changed].long()
    return _fault_of_ids(found, logits, bias, chosen, rules, kind) or _fault_of_weights(
        weights[changed], found, logits, chosen, rules, kind
    )


def _fault_of_ids(
    found: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    chosen: torch.Tensor,
    rules: torch.Tensor,
    kind: RouterKind,
) -> str | None:
    if ((found < 0) | (found >= logits.shape[1])).any() or (found.sort(dim=1).values.diff(dim=1) == 0).any():
        return "an expert is not of the layer, or is selected twice"
    top_k = found.shape[1]
    router = unsteered(logits, bias, kind, top_k)
    tier = torch.where(chosen, 2, router.kept.long())
    tier = torch.where(rules > 0, 3, torch.where(rules < 0, -1, tier))
    by_c = router.c.argsort(dim=1, descending=True, stable=True)
    wanted = by_c.gather(1, tier.gather(1, by_c).argsort(dim=1, descending=True, stable=True))[:, :top_k]
    tiers = (tier.gather(1, found), tier.gather(1, wanted))
    # Whether a group is kept, tier 1 or 0, is all that may be unsure.
    if (tiers[0].where(tiers[0] != 0, 1) != tiers[1].where(tiers[1] != 0, 1)).any():
        return "a rule does not hold, or a choice of the model's own went before its time"
    c = (router.c.gather(1, found), router.c.gather(1, wanted))
    gaps = -router.c.gather(1, by_c).diff(dim=1)
    clear = ((gaps == 0) | (gaps > router.near.gather(1, by_c)[:, :-1])).all(dim=1, keepdim=True)
    other = (tiers[0] != tiers[1]) | ((c[0] - c[1]).abs() > router.near.gather(1, wanted)) | (clear & (found != wanted))
    other[router.unsure] = False
    if not other.any():
        return None
    at = int(other.any(dim=1).nonzero()[0])
    return f"experts {found[at].tolist()} instead of {wanted[at].tolist()}"


def _fault_of_weights(
    weights: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor,
    chosen: torch.Tensor,
    rules: torch.Tensor,
    kind: RouterKind,
) -> str | None:
    z = logits.double()
    wanted = _weights(z, chosen, rules, ids, kind)
    error = WEIGHT_ERROR + 2.0**-22 * float(z.nan_to_num(0, 0, 0).abs().max())
    if weights.dtype is not torch.float32:
        error += 2 * torch.finfo(weights.dtype).eps
    close = torch.isclose(weights.double(), wanted, rtol=error, atol=1e-7)
    if close.all():
        return None
    at = (~close).nonzero()[0].tolist()
    return f"{int((~close).sum())} weights differ, the first is {weights[*at]} instead of {wanted[*at]}"


def _weights(
    z: torch.Tensor, chosen: torch.Tensor, rules: torch.Tensor, ids: torch.Tensor, kind: RouterKind
) -> torch.Tensor:
    """Weights `[T, K]` of experts `ids`, of logits to which the rules' margins were given, in float32."""
    above = (z.masked_fill(~chosen, -torch.inf).amax(dim=1, keepdim=True) + MARGIN).float().double()
    below = (z.amin(dim=1, keepdim=True) - MARGIN).float().double()
    steered = torch.where(rules.isposinf(), above, torch.where(rules < 0, below, z))
    weights = scores(steered, kind).gather(1, ids)
    if kind.renormalize:
        weights = weights / (weights.sum(dim=1, keepdim=True) + NO_SUM)
    return weights * kind.scale
