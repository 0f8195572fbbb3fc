"""The correction of a selection as one Triton kernel; `reselect.reselect` says what it computes.

A program is one token. It reads 4 bytes, the token's slot, and ends there when the token is not steered; else its
rules, 2 E bytes; and only where the layer has one, logits, bias and selection. Sorting is K rounds of one maximum, over
64-bit keys that hold tier, c and index, so that a round needs no second reduction and equal c go by index.
"""

# What a Triton kernel takes and gives has no Python type.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_steermoe_plugin.device.kernels.tiles import MAX_EXPERTS
from vllm_steermoe_plugin.device.reselect import NO_SUM
from vllm_steermoe_plugin.device.rewrite import EPSILON
from vllm_steermoe_plugin.device.router_kind import RouterKind
from vllm_steermoe_plugin.steering.rule_values import FORCED, OWN_WEIGHT

_SCORES = {"softmax": 0, "sigmoid": 1, "sqrtsoftplus": 2}
_EXPERTS_OF_A_WARP = 512


@triton.jit(do_not_specialize=["row"], do_not_specialize_on_alignment=["token_slots"])
def reselect_kernel(
    weights,
    ids,
    logits,
    bias,
    rules,
    token_slots,
    row,
    WEIGHT_STRIDE: tl.constexpr,
    ID_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    LAYER_STRIDE: tl.constexpr,
    TOKEN_SLOT_STRIDE: tl.constexpr,
    SCORE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    EPSILON: tl.constexpr,
    NO_SUM: tl.constexpr,
    OWN_WEIGHT: tl.constexpr,
    FORCED: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(token_slots + token * TOKEN_SLOT_STRIDE).to(tl.int64)
    if slot > 0:
        experts = tl.arange(0, BLOCK_E)
        in_row = experts < NUM_EXPERTS
        rule = tl.load(
            rules + slot * SLOT_STRIDE + row.to(tl.int64) * LAYER_STRIDE + experts, mask=in_row, other=0.0
        ).to(tl.float32)
        if tl.max(tl.where(tl.abs(rule) > FORCED, 1, 0), axis=0) > 0:
            logit_at = logits + token * TOKEN_STRIDE + experts.to(tl.int64) * EXPERT_STRIDE
            z = tl.load(logit_at, mask=in_row, other=-float("inf")).to(tl.float32)
            chosen = experts < 0
            for k in range(TOP_K):
                chosen |= experts == tl.load(ids + token * ID_STRIDE + k).to(tl.int32)
            chosen &= in_row
            activated, deactivated = rule > FORCED, rule < -FORCED
            # NaN is not below +inf; an empty row has no number above -inf.
            unsound = tl.max(tl.where(in_row & ~(z < float("inf")), 1, 0), axis=0)
            unsound |= tl.where(tl.max(z, axis=0) == -float("inf"), 1, 0)
            if (unsound > 0) | (tl.max(tl.where(activated | (deactivated & chosen), 1, 0), axis=0) > 0):
                c = _score(z, in_row, SCORE)
                if HAS_BIAS:
                    c += tl.load(bias + experts, mask=in_row, other=0).to(tl.float32)
                tier = tl.where(chosen, 2, _in_kept_groups(c, experts, in_row, GROUPS, KEPT, HAS_BIAS, NUM_EXPERTS))
                tier = tl.where(activated, 3, tl.where(deactivated, -1, tier))
                key = tl.where(in_row, ((tier + 1).to(tl.int64) << 43) | _key(c, experts), -1)

                top = tl.max(tl.where(chosen, z, -float("inf")), axis=0)
                bottom = tl.min(tl.where(in_row, z, float("inf")), axis=0)
                z_new = tl.where(deactivated, bottom - EPSILON, z)
                z_new = tl.where(activated & (rule != OWN_WEIGHT), top + EPSILON, z_new)
                score = _score(z_new, in_row, SCORE)

                places = tl.arange(0, BLOCK_K)
                new_ids = tl.zeros([BLOCK_K], tl.int32)
                new = tl.zeros([BLOCK_K], tl.float32)
                for k in range(TOP_K):
                    best = tl.max(key, axis=0)
                    taken = key == best
                    new_ids = tl.where(places == k, 1023 - (best & 1023).to(tl.int32), new_ids)
                    new = tl.where(places == k, tl.sum(tl.where(taken, score, 0.0), axis=0), new)
                    key = tl.where(taken, -1, key)
                if RENORMALIZE:
                    new = new / (tl.sum(new, axis=0) + NO_SUM)
                new = tl.where(unsound > 0, float("nan"), new * SCALE)
                in_top = places < TOP_K
                tl.store(weights + token * WEIGHT_STRIDE + places, new.to(weights.dtype.element_ty), mask=in_top)
                id_at = ids + token * ID_STRIDE + places
                tl.store(id_at, new_ids.to(ids.dtype.element_ty), mask=in_top & (unsound == 0))


@triton.jit
def _score(z, in_row, SCORE: tl.constexpr):
    """u of a row of logits."""
    if SCORE == 0:
        e = tl.exp(z - tl.max(z, axis=0))
        score = e / tl.sum(tl.where(in_row, e, 0.0), axis=0)
    elif SCORE == 1:
        score = 1.0 / (1.0 + tl.exp(-z))
    else:
        # log(1 + x) loses a small x; the quotient gives back what rounding took.
        x = tl.exp(-tl.abs(z))
        y = 1.0 + x
        log1p = tl.where(y == 1.0, x, x * tl.log(y) / tl.where(y == 1.0, 1.0, y - 1.0))
        score = tl.sqrt(tl.maximum(z, 0.0) + log1p)
    return score


@triton.jit
def _key(x, experts):
    """A key of 43 bits that orders float32 `x` as numbers, and equal ones by index."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    return (ordered << 10) | (1023 - experts)


@triton.jit
def _in_kept_groups(
    c,
    experts,
    in_row,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
):
    """1 for an expert of a group from which the router selects, else 0."""
    kept = tl.where(in_row, 1, 0)
    if GROUPS != KEPT:
        group = experts // (NUM_EXPERTS // GROUPS)
        best = tl.zeros_like(c)
        expert_key = _key(c, experts)
        for g in range(GROUPS):
            mine = (group == g) & in_row
            largest = tl.max(tl.where(mine, c, -float("inf")), axis=0)
            if HAS_BIAS:
                first = tl.max(tl.where(mine, expert_key, -1), axis=0)
                largest += tl.max(tl.where(mine & (expert_key != first), c, -float("inf")), axis=0)
            best = tl.where(mine, largest, best)
        group_key = tl.where(in_row, _key(best, group), -1)
        kept = tl.zeros_like(kept)
        for _ in range(KEPT):
            now = group_key == tl.max(group_key, axis=0)
            kept = tl.where(now, 1, kept)
            group_key = tl.where(now, -1, group_key)
    return kept


def reselect(
    weights: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    rules: torch.Tensor,
    token_slots: torch.Tensor,
    row: int,
    kind: RouterKind,
) -> None:
    """Correct `weights` and `ids [T, K]` in place by `rules[token_slots[:T], row]`; `rules` is float16 `[S, L, E]`.

    Raises:
        ValueError: more tokens than slots, or more experts than a program can hold; rows of weights or ids that are
            not contiguous.
    """
    num_tokens, num_experts = logits.shape
    if num_tokens > len(token_slots):
        raise ValueError(f"{num_tokens} tokens, but slots for {len(token_slots)}")
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"{num_experts} experts in a layer; the kernel takes 1 to {MAX_EXPERTS}")
    if weights.stride(1) != 1 or ids.stride(1) != 1:
        raise ValueError(f"a row's weights and ids must be contiguous, got strides {weights.stride()}, {ids.stride()}")
    if num_tokens:
        reselect_kernel[(num_tokens,)](
            weights,
            ids,
            logits,
            logits if bias is None else bias,
            rules,
            token_slots,
            row,
            num_warps=warps(num_experts),
            **constants(weights, ids, logits, rules, token_slots, kind),
        )


def warps(num_experts: int) -> int:
    """Warps of a program: a row in one, where its registers allow it."""
    return 1 if num_experts <= _EXPERTS_OF_A_WARP else 2


def constants(
    weights: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor,
    rules: torch.Tensor,
    token_slots: torch.Tensor,
    kind: RouterKind,
) -> dict[str, int | float | bool]:
    """What is compiled into the kernel, by the name of its parameter."""
    return {
        "WEIGHT_STRIDE": weights.stride(0),
        "ID_STRIDE": ids.stride(0),
        "TOKEN_STRIDE": logits.stride(0),
        "EXPERT_STRIDE": logits.stride(1),
        "SLOT_STRIDE": rules.stride(0),
        "LAYER_STRIDE": rules.stride(1),
        "TOKEN_SLOT_STRIDE": token_slots.stride(0),
        "SCORE": _SCORES[kind.score],
        "HAS_BIAS": kind.bias,
        "GROUPS": kind.groups,
        "KEPT": kind.kept,
        "RENORMALIZE": kind.renormalize,
        "SCALE": kind.scale,
        "EPSILON": EPSILON,
        "NO_SUM": NO_SUM,
        "OWN_WEIGHT": OWN_WEIGHT,
        "FORCED": FORCED,
        "NUM_EXPERTS": logits.shape[1],
        "TOP_K": ids.shape[1],
        "BLOCK_E": triton.next_power_of_2(logits.shape[1]),
        "BLOCK_K": triton.next_power_of_2(ids.shape[1]),
    }
