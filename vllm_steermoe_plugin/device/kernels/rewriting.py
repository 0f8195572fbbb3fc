"""The rewrite of router logits as one Triton kernel; `rewrite.apply_rules` says what it computes.

Bytes of a token: 4 (its slot) when it is not steered or the step has no rule here, and nothing else is read. Else
2 E more for its rules, which most tokens share, so that they come from the cache; and its logits, read once and, if it
has a rule in this layer, written once. Two trips to memory in a row, the slot's and the rules' beside the logits', then
three reductions beside each other; for log-probabilities a sum follows the maximum. In a layer where a token of the
step has a bias come five more, two after each other for sigma and two for the extremes.
"""

# What a Triton kernel takes and gives has no Python type.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_steermoe_plugin.device.kernels.tiles import Tile, choose_tile
from vllm_steermoe_plugin.device.rewrite import EPSILON
from vllm_steermoe_plugin.steering.rule_values import BIASES, FORCED, FORCES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of router logits."""


# Strides do not change while a model runs; as constants they tell the compiler how rows are aligned, which a run-time
# stride does only if 16 divides it (not with 8 or 60 experts). T and the layer must not become part of a kernel's
# identity: Triton would compile one for 1, one for multiples of 16 and one for the rest, perhaps during a capture.
# Of a sequence-parallel layer, slots begin wherever its rank's share of the step does.
@triton.jit(do_not_specialize=["num_tokens", "row"], do_not_specialize_on_alignment=["token_slots"])
def rewrite_kernel(
    logits,
    rules,
    token_slots,
    active,
    num_tokens,
    row,
    TOKEN_STRIDE: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    LAYER_STRIDE: tl.constexpr,
    TOKEN_SLOT_STRIDE: tl.constexpr,
    LOG_SOFTMAX: tl.constexpr,
    BFLOAT16: tl.constexpr,
    FORCES: tl.constexpr,
    FORCED: tl.constexpr,
    DOES: tl.constexpr,
    BIASES: tl.constexpr,
    EPSILON: tl.constexpr,
    UNIT: tl.constexpr,
    LN_2: tl.constexpr,
    LOG2_E: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tokens = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    slots = tl.load(token_slots + tokens * TOKEN_SLOT_STRIDE, mask=tokens < num_tokens, other=0)
    # Of the whole step: that any of its tokens has a bias here is told by a number, not by a reduction over warps.
    does = tl.load(active + row)
    if (tl.max(slots, axis=0) > 0) & ((does & DOES) != 0):
        experts = tl.arange(0, BLOCK_E)[None, :]
        in_row = experts < NUM_EXPERTS
        steered = (slots > 0)[:, None] & in_row
        # int64: slots * layers * experts may pass 2**31.
        rule_at = slots.to(tl.int64)[:, None] * SLOT_STRIDE + row.to(tl.int64) * LAYER_STRIDE + experts
        rule = tl.load(rules + rule_at, mask=steered, other=0.0)
        logit_at = logits + tokens[:, None] * TOKEN_STRIDE + experts.to(tl.int64) * EXPERT_STRIDE
        # Beside the rules, not after them: that spares a trip to memory.
        z = tl.load(logit_at, mask=steered, other=-float("inf")).to(tl.float32)
        dtype = logits.dtype.element_ty
        activated, deactivated = (rule > FORCED) & FORCES, (rule < -FORCED) & FORCES

        top = tl.max(z, axis=1)[:, None]
        bottom = tl.min(tl.where(in_row, z, float("inf")), axis=1)[:, None]
        # One reduction for three questions: does a rule force (bit 0), is there a bias (bit 1), NaN or +inf (bit 2)?
        marks = tl.where(activated | deactivated, 1, tl.where((rule != 0.0) & (tl.abs(rule) < FORCED), 2, 0))
        found = tl.reduce(marks | tl.where(z < float("inf"), 0, 4), 1, _or)
        if (does & BIASES) != 0:
            z = _biased(z, rule, in_row, FORCED).to(dtype).to(tl.float32)
            top = tl.max(z, axis=1)[:, None]
            bottom = tl.min(tl.where(in_row, z, float("inf")), axis=1)[:, None]
        found = found[:, None]
        written = ((found & 3) != 0) & in_row
        broken = (found >= 4) | ~(tl.abs(top) < float("inf"))
        if LOG_SOFTMAX:
            shifted = z - top
            log2_sum = tl.log2(tl.sum(tl.exp2(shifted * LOG2_E), axis=1))[:, None]
            # The same operation gives every score and the two extremes, and it keeps order: no score lies beyond
            # them, however the compiler arranges the rest.
            s = tl.where((found & 1) != 0, tl.fma(log2_sum, -LN_2, shifted), z)
            high = tl.fma(log2_sum, -LN_2, top - top)
            low = tl.fma(log2_sum, -LN_2, bottom - top)
            high_rounded = high.to(dtype).to(tl.float32)
            low_rounded = low.to(dtype).to(tl.float32)
        else:
            s, high, low, high_rounded, low_rounded = z, top, bottom, top, bottom
        if BFLOAT16:
            high_rounded = high.to(tl.bfloat16).to(tl.float32)
            low_rounded = low.to(tl.bfloat16).to(tl.float32)
        above = tl.maximum(high + EPSILON, high_rounded + _power_of_two(high_rounded) * UNIT)
        below = tl.minimum(low - EPSILON, low_rounded - _power_of_two(low_rounded) * UNIT)
        out = tl.where(activated, above, tl.where(deactivated, below, s))
        out = tl.where(broken, float("nan"), out)
        # The whole row, in wide accesses: what has no rule comes back to the same bits.
        tl.store(logit_at, out.to(dtype), mask=written)


@triton.jit
def _biased(z, rule, in_row, FORCED: tl.constexpr):
    """Logits with their biases in float32; without one, they are as they were."""
    known = (z > -float("inf")) & in_row
    number = tl.sum(tl.where(known, 1.0, 0.0), axis=1)[:, None]
    mean = tl.sum(tl.where(known, z, 0.0), axis=1)[:, None] / number
    away = tl.where(known, z - mean, 0.0)
    sigma = tl.sqrt(tl.sum(away * away, axis=1)[:, None] / number)
    bias = rule.to(tl.float32)
    return tl.where((bias != 0.0) & (tl.abs(bias) < FORCED), z + bias * sigma, z)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _power_of_two(x):
    """2**floor(log2 |x|) of a float32; 0 at 0."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


def rewrite(
    logits: torch.Tensor,
    rules: torch.Tensor,
    token_slots: torch.Tensor,
    active: torch.Tensor,
    row: int,
    log_softmax: bool = False,
    bfloat16: bool = False,
    forces: bool = True,
) -> None:
    """Rewrite `logits [T, E]` in place by `rules[token_slots[:T], row]`; `rules` is float16 `[S, L, E]`."""
    num_tokens, num_experts = logits.shape
    if num_tokens:
        launch(
            logits, rules, token_slots, active, row, choose_tile(num_experts, num_tokens), log_softmax, bfloat16, forces
        )


def launch(
    logits: torch.Tensor,
    rules: torch.Tensor,
    token_slots: torch.Tensor,
    active: torch.Tensor,
    row: int,
    tile: Tile,
    log_softmax: bool = False,
    bfloat16: bool = False,
    forces: bool = True,
) -> None:
    """`rewrite` with a tile of one's own.

    Raises:
        TypeError: the kernel was not made for this dtype.
        ValueError: more tokens than slots; the kernel would read beyond them.
    """
    if len(logits) > len(token_slots):
        raise ValueError(f"{len(logits)} tokens, but slots for {len(token_slots)}")
    if logits.dtype not in DTYPES:
        raise TypeError(f"router logits are {logits.dtype}; the kernel takes {', '.join(map(str, DTYPES))}")
    num_tokens = logits.shape[0]
    rewrite_kernel[(triton.cdiv(num_tokens, tile.tokens),)](
        logits,
        rules,
        token_slots,
        active,
        num_tokens,
        row,
        num_warps=tile.warps,
        **constants(logits, rules, token_slots, tile, log_softmax, bfloat16, forces),
    )


def constants(
    logits: torch.Tensor,
    rules: torch.Tensor,
    token_slots: torch.Tensor,
    tile: Tile,
    log_softmax: bool = False,
    bfloat16: bool = False,
    forces: bool = True,
) -> dict[str, int | float | bool]:
    """What is compiled into the kernel, by the name of its parameter."""
    return {
        "TOKEN_STRIDE": logits.stride(0),
        "EXPERT_STRIDE": logits.stride(1),
        "SLOT_STRIDE": rules.stride(0),
        "LAYER_STRIDE": rules.stride(1),
        "TOKEN_SLOT_STRIDE": token_slots.stride(0),
        "LOG_SOFTMAX": log_softmax,
        "BFLOAT16": bfloat16,
        "FORCES": forces,
        "FORCED": FORCED,
        "DOES": BIASES | FORCES * forces,
        "BIASES": BIASES,
        "EPSILON": EPSILON,
        "LN_2": math.log(2),
        "LOG2_E": 1 / math.log(2),
        "UNIT": torch.finfo(torch.bfloat16 if bfloat16 else logits.dtype).eps,
        "NUM_EXPERTS": logits.shape[1],
        "BLOCK_T": tile.tokens,
        "BLOCK_E": tile.experts,
    }
