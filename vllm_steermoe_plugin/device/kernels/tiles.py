"""How the rewrite is cut into programs. Plain Python: no Triton, no measuring at run time.

There is no autotuning: a tuner times kernels when it meets a new shape, and while a CUDA
graph is captured nothing may be timed. A tile depends on E and on whether a step is
small, so a model needs two kernels per dtype, and both are compiled before any capture.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_EXPERTS = 1024
"""A row of logits stays in the registers of one program."""
SMALL_STEP = 512
"""Largest T of a small step, in tokens; the largest step that vLLM captures by default."""

_LANES = 32
_LOGITS, _MOST_LOGITS = 4, 16
"""Of a thread: in rows of less than `_WIDE`, and at most."""
_SMALL, _LARGE = (512, 16, 1), (1024, 32, 4)
"""Logits of a program, its tokens at most, its warps at least."""
_WIDE = 256
"""E from which a warp holds one row."""
_LARGE_WIDE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Tile:
    """A program's share of the logits `[T, E]`.

    Attributes:
        tokens: rows of a program, a power of two.
        experts: columns of a program: E rounded up to a power of two.
        warps: of 32 threads.
    """

    tokens: int
    experts: int
    warps: int


def choose_tile(num_experts: int, num_tokens: int) -> Tile:
    """The tile for logits `[num_tokens, num_experts]`.

    Up to E = 128, four logits a thread, and as many tokens as make 512 logits of a small step (16 tokens at most) or
    1024 of a large one (32 at most). From E = 256 on, a row in one warp: reduced by several it goes through shared
    memory, which takes up to twice as long. On an H100 these are, of all tiles, the fastest or within 10 % of it, in
    bfloat16 and float32 (`benchmarks/gpu/results`); E = 1024 was not measured.

    Raises:
        ValueError: more experts than a program can hold.
    """
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"{num_experts} experts in a layer; the kernel takes 1 to {MAX_EXPERTS}")
    experts = 1 << (num_experts - 1).bit_length()
    small = num_tokens <= SMALL_STEP
    if experts >= _WIDE:
        tokens = (4 if experts == _WIDE else 1) if small else _LARGE_WIDE_TOKENS
        return Tile(tokens, experts, tokens * max(1, experts // (_MOST_LOGITS * _LANES)))
    logits, most_tokens, least_warps = _SMALL if small else _LARGE
    tokens = min(most_tokens, logits // experts)
    return Tile(tokens, experts, max(least_warps, tokens * experts // (_LOGITS * _LANES)))
