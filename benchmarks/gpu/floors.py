"""The two kernels that others are compared with: one that does nothing, and one that copies."""

# What a Triton kernel takes has no Python type.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 2048


@triton.jit
def _empty_kernel(anything):
    pass


# Triton must know whether 16 divides the size, or it copies element by element.
@triton.jit
def _copy_kernel(source, target, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < size), mask=at < size)


def empty(anything: torch.Tensor) -> None:
    """One program that does nothing."""
    _empty_kernel[(1,)](anything, num_warps=1)


def copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy contiguous memory, 16 elements a thread."""
    _copy_kernel[(triton.cdiv(source.numel(), _BLOCK),)](source, target, source.numel(), BLOCK=_BLOCK, num_warps=4)
