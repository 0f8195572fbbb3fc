"""Rows of the tables of times. Plain data: no Triton."""

from __future__ import annotations

from dataclasses import dataclass

STEPS = (1, 8, 64, 512, 8192)
"""T, tokens of a step."""


@dataclass(frozen=True, slots=True)
class Row:
    """Microseconds per layer, in a CUDA graph of many launches.

    Attributes:
        num_bytes: that a steered step must move: logits read and written, slots read.
        empty: a kernel that does nothing (the first floor).
        at_bandwidth: `num_bytes` at the bandwidth of a copy of a gigabyte.
        copy: a kernel that copies as many bytes (the second floor, with what it costs to launch).
        idle: no token is steered.
        elsewhere: every token is steered, but not in this layer.
        steered: every token has rules that force in this layer.
        biased: every token has biases beside them.
        count_idle: counting when no token is counted.
        count: counting when every token is.
        spread: range of the middle half of the replays, of the column where it is largest.
        clock: of the multiprocessors just after, such as `1980 MHz`.
    """

    model: str
    tokens: int
    dtype: str
    num_bytes: int
    empty: float
    at_bandwidth: float
    copy: float
    idle: float
    elsewhere: float
    steered: float
    biased: float
    count_idle: float
    count: float
    spread: float
    clock: str = "unknown"


@dataclass(frozen=True, slots=True)
class SelectionRow:
    """Microseconds per layer of the correction of a selection, in a CUDA graph of many launches.

    Attributes:
        empty: a kernel that does nothing.
        gate: the rewrite of the same logits, every token steered.
        idle: no token is steered.
        elsewhere: every token is steered, but not in this layer.
        steered: every token has rules in this layer.
        spread: range of the middle half of the replays, of the column where it is largest.
        clock: of the multiprocessors just after.
    """

    model: str
    tokens: int
    dtype: str
    empty: float
    gate: float
    idle: float
    elsewhere: float
    steered: float
    spread: float
    clock: str = "unknown"


@dataclass(frozen=True, slots=True)
class ColdTime:
    """Microseconds per layer over an empty kernel where slots and rules come from memory.

    Before each launch, more is copied than the cache holds, as a layer's weights pass through it before the same layer
    comes again in the next step. Logits come from memory too, which a router would have just written.

    Attributes:
        idle: no token is steered.
        steered: every token has rules in this layer.
    """

    model: str
    tokens: int
    idle: float
    steered: float


@dataclass(frozen=True, slots=True)
class HostTime:
    """Median microseconds of the host for something done once in a step of `tokens` tokens."""

    step: str
    tokens: int
    microseconds: float


@dataclass(frozen=True, slots=True)
class TileTime:
    """Microseconds per layer with programs of `rows` tokens and `warps` warps.

    Attributes:
        chosen: whether it is the tile that `choose_tile` gives.
        steered: every token has rules in this layer.
        idle: no token is steered.
    """

    experts: int
    tokens: int
    dtype: str
    rows: int
    warps: int
    chosen: bool
    steered: float
    idle: float
