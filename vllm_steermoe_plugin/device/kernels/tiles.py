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
_SMALL_ELEMENTS = 4 * _LANES
_LARGE_ELEMENTS = 1024
_LARGE_TOKENS = 16


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

    A small step waits for latency, not for bytes: one token per program, or as many as give each thread of a warp
    four logits (with fewer, the compiler moves them about in shared memory); as few warps as hold a row with
    eight logits a thread, since one warp reduces without shared memory. A large step moves bytes, and has instructions
    to issue: eight logits a thread, up to 16 tokens and 1024 logits per program, so that T = 8192 is 512 programs or
    more (an idle program costs its launch only, and a GPU has about 130 multiprocessors).

    Raises:
        ValueError: more experts than a program can hold.
    """
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"{num_experts} experts in a layer; the kernel takes 1 to {MAX_EXPERTS}")
    experts = 1 << (num_experts - 1).bit_length()
    if num_tokens <= SMALL_STEP:
        return Tile(max(1, _SMALL_ELEMENTS // experts), experts, max(1, experts // (8 * _LANES)))
    tokens = min(_LARGE_TOKENS, _LARGE_ELEMENTS // experts)
    return Tile(tokens, experts, max(1, tokens * experts // (8 * _LANES)))
