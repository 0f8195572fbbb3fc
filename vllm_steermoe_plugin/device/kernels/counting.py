"""Counting of the selected experts as one Triton kernel: an atomic addition for each selection that counts."""

# What a Triton kernel takes has no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl

_SELECTIONS = 128
_WARPS = 4
"""One selection per thread: each waits for an atomic addition of its own, so more of them under way is better."""


@triton.jit(do_not_specialize=["num_tokens", "row"])
def count_kernel(
    topk_ids,
    counters,
    token_groups,
    num_tokens,
    row,
    TOKEN_STRIDE: tl.constexpr,
    CHOICE_STRIDE: tl.constexpr,
    LAYER_STRIDE: tl.constexpr,
    GROUP_STRIDE: tl.constexpr,
    TOKEN_GROUP_STRIDE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    selections = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tokens = (selections // TOP_K).to(tl.int64)
    groups = tl.load(token_groups + tokens * TOKEN_GROUP_STRIDE, mask=tokens < num_tokens, other=0)
    if tl.max(groups, axis=0) > 0:
        id_at = topk_ids + tokens * TOKEN_STRIDE + (selections % TOP_K).to(tl.int64) * CHOICE_STRIDE
        experts = tl.load(id_at, mask=groups > 0, other=0).to(tl.int64)
        # An id outside the layer is not written anywhere; the counts then do not add up, which is noticed.
        counted = (groups > 0) & (experts >= 0) & (experts < NUM_EXPERTS)
        counter_at = counters + row.to(tl.int64) * LAYER_STRIDE + groups.to(tl.int64) * GROUP_STRIDE + experts
        tl.atomic_add(counter_at, tl.full([BLOCK], 1, tl.int64), mask=counted, sem="relaxed")


def count(topk_ids: torch.Tensor, counters: torch.Tensor, token_groups: torch.Tensor, row: int) -> None:
    """Add one to `counters[row, group, expert]` for each of `topk_ids [T, K]` of a token in a group from 1 on.

    `counters` is int64 `[L, G + 1, E]`.

    Raises:
        ValueError: more tokens than groups; the kernel would read beyond them.
    """
    num_tokens, top_k = topk_ids.shape
    if num_tokens > len(token_groups):
        raise ValueError(f"{num_tokens} tokens, but groups for {len(token_groups)}")
    if num_tokens:
        count_kernel[(triton.cdiv(num_tokens * top_k, _SELECTIONS),)](
            topk_ids,
            counters,
            token_groups,
            num_tokens,
            row,
            TOKEN_STRIDE=topk_ids.stride(0),
            CHOICE_STRIDE=topk_ids.stride(1),
            LAYER_STRIDE=counters.stride(0),
            GROUP_STRIDE=counters.stride(1),
            TOKEN_GROUP_STRIDE=token_groups.stride(0),
            NUM_EXPERTS=counters.shape[2],
            TOP_K=top_k,
            BLOCK=_SELECTIONS,
            num_warps=_WARPS,
        )
