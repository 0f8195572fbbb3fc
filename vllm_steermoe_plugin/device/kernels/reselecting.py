"""The correction of a selection as one Triton kernel; `reselect.reselect` says what it computes.

A row lies in one warp; a program is one token of a small step, several of a large one. It reads 4 bytes a token, its
slot, and ends there when no token is steered; else rules, logits and selection beside each other, and the bias only
where something is to be corrected. Sorting is K rounds of two maxima of 32 bits, each one instruction of a warp: the
first of tier and all but 3 bits of c, the second of those 3 bits and the index, so that equal c go by index.
"""

# What a Triton kernel takes and gives has no Python type.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_steermoe_plugin.device.kernels.tiles import MAX_EXPERTS, SMALL_STEP, Tile
from vllm_steermoe_plugin.device.reselect import NO_SUM
from vllm_steermoe_plugin.device.rewrite import EPSILON
from vllm_steermoe_plugin.device.router_kind import RouterKind
from vllm_steermoe_plugin.steering.rule_values import FORCED, FORCES, OWN_WEIGHT

_SCORES = {"softmax": 0, "sigmoid": 1, "sqrtsoftplus": 2}
_COLUMNS_OF_A_WARP = 512
_LARGE_TOKENS = 8
"""Of a program. Where nothing is steered, the start of programs is what takes time."""


@triton.jit(do_not_specialize=["num_tokens", "row"], do_not_specialize_on_alignment=["token_slots"])
def reselect_kernel(
    weights,
    ids,
    logits,
    bias,
    rules,
    token_slots,
    active,
    num_tokens,
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
    KEPT: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    EPSILON: tl.constexpr,
    NO_SUM: tl.constexpr,
    OWN_WEIGHT: tl.constexpr,
    FORCED: tl.constexpr,
    FORCES: tl.constexpr,
    TAKEN: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tokens = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    slots = tl.load(token_slots + tokens * TOKEN_SLOT_STRIDE, mask=tokens < num_tokens, other=0)
    if (tl.max(slots, axis=0) > 0) & ((tl.load(active + row) & FORCES) != 0):
        # Each group begins at a multiple of its length rounded up to a power of two.
        columns = tl.arange(0, BLOCK_E)[None, :]
        group, of_group = columns // (BLOCK_E // BLOCK_G), columns % (BLOCK_E // BLOCK_G)
        experts = group * GROUP_SIZE + of_group
        in_row = (group < GROUPS) & (of_group < GROUP_SIZE)
        steered = (slots > 0)[:, None]
        read = steered & in_row
        # int64: slots * layers * experts may pass 2**31.
        rules_of = rules + slots.to(tl.int64)[:, None] * SLOT_STRIDE + row.to(tl.int64) * LAYER_STRIDE
        logits_of = logits + tokens[:, None] * TOKEN_STRIDE
        ids_of = ids + tokens[:, None] * ID_STRIDE
        rule = _force(tl.load(rules_of + experts, mask=read, other=0.0), FORCED, OWN_WEIGHT)
        # Beside the rules, not after them: that spares a trip to memory.
        logit_at = logits_of + experts.to(tl.int64) * EXPERT_STRIDE
        z = tl.load(logit_at, mask=read, other=-float("inf")).to(tl.float32)
        chosen = experts < 0
        for at in tl.static_range(TOP_K):
            chosen |= experts == tl.load(ids_of + at, mask=steered, other=-1).to(tl.int32)
        chosen &= in_row
        # One reduction for four questions: does a rule force, is it to be obeyed, NaN or +inf, a number above -inf?
        marks = tl.where(rule != 0, 1, 0) | tl.where((rule > 0) | ((rule < 0) & chosen), 2, 0)
        marks |= tl.where(z < float("inf"), 0, 4) | tl.where(z > -float("inf"), 8, 0)
        found = tl.reduce(marks, 1, _or)[:, None]
        sound = (found & 12) == 8
        written = tl.where(sound, found & 2, found & 1) > 0
        if tl.max(written.to(tl.int32)) > 0:
            c = _score(z, z, SCORE)
            if HAS_BIAS:
                # By rows, though all have the same: so it lies as the rest does, and goes through no shared memory.
                c += tl.load(bias + experts, mask=read, other=0).to(tl.float32)
            tier = tl.where(chosen, 2, 1)
            if GROUPS > 1:
                kept = _in_kept_groups(tl.where(in_row, c, -float("inf")), HAS_BIAS, KEPT, BLOCK_G)
                tier = tl.where(chosen, 2, kept)
            tier = tl.where(rule > 0, 3, tl.where(rule < 0, -1, tier))
            top = tl.max(tl.where(chosen, z, -float("inf")), axis=1)[:, None] + EPSILON
            bottom = tl.min(tl.where(in_row, z, float("inf")), axis=1)[:, None] - EPSILON

            new_ids = _first(c, tier, experts, in_row, TAKEN, TOP_K, BLOCK_K)
            places = tl.arange(0, BLOCK_K)[None, :]
            stored = written & (places < TOP_K)
            new_z = tl.load(logits_of + new_ids.to(tl.int64) * EXPERT_STRIDE, mask=stored, other=0).to(tl.float32)
            new_rule = _force(tl.load(rules_of + new_ids, mask=stored, other=0.0), FORCED, OWN_WEIGHT)
            new = _score(_ruled(new_z, new_rule, top, bottom), _ruled(z, rule, top, bottom), SCORE)
            if RENORMALIZE:
                new = new / (tl.sum(tl.where(places < TOP_K, new, 0.0), axis=1)[:, None] + NO_SUM)
            new = tl.where(sound, new * SCALE, float("nan"))
            weight_at = weights + tokens[:, None] * WEIGHT_STRIDE + places
            tl.store(weight_at, new.to(weights.dtype.element_ty), mask=stored)
            tl.store(ids_of + places, new_ids.to(ids.dtype.element_ty), mask=stored & sound)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _first(c, tier, experts, in_row, TAKEN: tl.constexpr, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The first K experts by (tier, c); of equal ones that with the lower index."""
    # As integers, a float's bits are in its order.
    bits = (c + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(in_row, (tier << 29) + (ordered >> 3), TAKEN)
    rest = ((ordered & 7) << 10) | (1023 - experts)
    places = tl.arange(0, BLOCK_K)[None, :]
    ids = tl.zeros([c.shape[0], BLOCK_K], tl.int32)
    for k in range(TOP_K):
        first = tl.where(key == tl.max(key, axis=1)[:, None], rest, -1)
        best = tl.max(first, axis=1)[:, None]
        key = tl.where(first == best, TAKEN, key)
        ids = tl.where(places == k, 1023 - (best & 1023), ids)
    return ids


@triton.jit
def _force(rule, FORCED: tl.constexpr, OWN_WEIGHT: tl.constexpr):
    """Of rules, in a byte: 1 activate, 2 activate with its own weight, -1 deactivate, 0."""
    up = tl.where(rule == OWN_WEIGHT, 2, 1)
    return tl.where(rule > FORCED, up, tl.where(rule < -FORCED, -1, 0)).to(tl.int8)


@triton.jit
def _ruled(z, rule, top, bottom):
    """z' of logits, in whose row activated experts get `top` and deactivated ones `bottom`."""
    return tl.where(rule < 0, bottom, tl.where(rule == 1, top, z))


@triton.jit
def _score(x, z, SCORE: tl.constexpr):
    """u of logits `x` that are of rows `z`."""
    if SCORE == 0:
        top = tl.max(z, axis=1)[:, None]
        score = tl.exp(x - top) / tl.sum(tl.exp(z - top), axis=1)[:, None]
    elif SCORE == 1:
        score = 1.0 / (1.0 + tl.exp(-x))
    else:
        # log(1 + x) loses a small x; the quotient gives back what rounding took.
        e = tl.exp(-tl.abs(x))
        y = 1.0 + e
        log1p = tl.where(y == 1.0, e, e * tl.log(y) / tl.where(y == 1.0, 1.0, y - 1.0))
        score = tl.sqrt(tl.maximum(x, 0.0) + log1p)
    return score


@triton.jit
def _in_kept_groups(c, HAS_BIAS: tl.constexpr, KEPT: tl.constexpr, BLOCK_G: tl.constexpr):
    """1 for an expert of a group from which the router selects, else 0."""
    grouped = tl.reshape(c, [c.shape[0], BLOCK_G, c.shape[1] // BLOCK_G])
    if HAS_BIAS:
        largest, second = tl.reduce((grouped, tl.full(grouped.shape, -float("inf"), tl.float32)), 2, _two_largest)
        best = largest + second
    else:
        best = tl.max(grouped, axis=2)
    group = tl.arange(0, BLOCK_G)
    mine, other = best[:, :, None], best[:, None, :]
    ahead = (other > mine) | ((other == mine) & (group[None, :] < group[:, None])[None])
    kept = tl.where(tl.sum(ahead.to(tl.int32), axis=2) < KEPT, 1, 0)
    return tl.reshape(tl.broadcast_to(kept[:, :, None], grouped.shape), c.shape)


@triton.jit
def _two_largest(a, b, c, d):
    """Of two pairs, each of which is in order."""
    return tl.maximum(a, c), tl.maximum(tl.minimum(a, c), tl.maximum(b, d))


def reselect(
    weights: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    rules: torch.Tensor,
    token_slots: torch.Tensor,
    active: torch.Tensor,
    row: int,
    kind: RouterKind,
) -> None:
    """Correct `weights` and `ids [T, K]` in place by `rules[token_slots[:T], row]`; `rules` is float16 `[S, L, E]`."""
    num_tokens, num_experts = logits.shape
    if num_tokens:
        tile = choose_tile(num_experts, num_tokens, kind)
        launch(weights, ids, logits, bias, rules, token_slots, active, row, kind, tile)


def launch(
    weights: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    rules: torch.Tensor,
    token_slots: torch.Tensor,
    active: torch.Tensor,
    row: int,
    kind: RouterKind,
    tile: Tile,
) -> None:
    """`reselect` with a tile of one's own.

    Raises:
        ValueError: more tokens than slots; rows of weights or ids that are not contiguous.
    """
    num_tokens = len(logits)
    if num_tokens > len(token_slots):
        raise ValueError(f"{num_tokens} tokens, but slots for {len(token_slots)}")
    if weights.stride(1) != 1 or ids.stride(1) != 1:
        raise ValueError(f"a row's weights and ids must be contiguous, got strides {weights.stride()}, {ids.stride()}")
    reselect_kernel[(triton.cdiv(num_tokens, tile.tokens),)](
        weights,
        ids,
        logits,
        logits if bias is None else bias,
        rules,
        token_slots,
        active,
        num_tokens,
        row,
        num_warps=tile.warps,
        **constants(weights, ids, logits, rules, token_slots, kind, tile),
    )


def choose_tile(num_experts: int, num_tokens: int, kind: RouterKind) -> Tile:
    """The tile of a step: a row in one warp, where its registers allow it.

    Raises:
        ValueError: more experts than a program can hold.
    """
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"{num_experts} experts in a layer; the kernel takes 1 to {MAX_EXPERTS}")
    groups = _groups(kind)
    columns = triton.next_power_of_2(groups) * triton.next_power_of_2(num_experts // groups)
    # Rows of 512 fill the registers of their warp; several of them in a program leave a multiprocessor to few.
    tokens = 1 if num_tokens <= SMALL_STEP or columns >= _COLUMNS_OF_A_WARP else _LARGE_TOKENS
    return Tile(tokens, columns, tokens * max(1, columns // _COLUMNS_OF_A_WARP))


def _groups(kind: RouterKind) -> int:
    """Groups that the kernel has to tell apart."""
    return 1 if kind.groups == kind.kept else kind.groups


def constants(
    weights: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor,
    rules: torch.Tensor,
    token_slots: torch.Tensor,
    kind: RouterKind,
    tile: Tile,
) -> dict[str, int | float | bool]:
    """What is compiled into the kernel, by the name of its parameter."""
    groups = _groups(kind)
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
        "KEPT": kind.kept,
        "RENORMALIZE": kind.renormalize,
        "SCALE": kind.scale,
        "EPSILON": EPSILON,
        "NO_SUM": NO_SUM,
        "OWN_WEIGHT": OWN_WEIGHT,
        "FORCED": FORCED,
        "FORCES": FORCES,
        "TAKEN": -(2**31),
        "TOP_K": ids.shape[1],
        "GROUPS": groups,
        "GROUP_SIZE": logits.shape[1] // groups,
        "BLOCK_T": tile.tokens,
        "BLOCK_G": triton.next_power_of_2(groups),
        "BLOCK_E": tile.experts,
        "BLOCK_K": triton.next_power_of_2(ids.shape[1]),
    }
