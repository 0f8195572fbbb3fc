"""What the rewrite may cost, judged row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu.rows import Row

DECODE = 64
"""Largest T of a decode step that is judged."""
PREFILL = 8192
IDLE_LIMIT = 2.0
"""Microseconds per layer over an empty kernel, at T up to `DECODE`."""
STEERED_LIMIT = 3.0
COPY_LIMIT = 1.3
"""Times a kernel that copies the same bytes in the same graph, at T = `PREFILL`.

That kernel is the bandwidth floor that can be reached at this size: some megabytes at full bandwidth take less time
than it takes to launch anything. The time at full bandwidth stands in the table beside it."""


@dataclass(frozen=True, slots=True)
class Goal:
    """One judged figure."""

    name: str
    model: str
    tokens: int
    dtype: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether the figure is within its limit; a figure that is no number is not."""
        return self.value <= self.limit

    def __str__(self) -> str:
        unit = "times" if self.name == "prefill" else "us"
        verdict = "met" if self.met else "NOT MET"
        return (
            f"{verdict}: {self.name}, {self.model}, T={self.tokens}, {self.dtype}: "
            f"{self.value:.2f} {unit} (limit {self.limit})"
        )


def judge(rows: Sequence[Row]) -> list[Goal]:
    """Every goal of every row."""
    goals = []
    for row in rows:
        about = (row.model, row.tokens, row.dtype)
        if row.tokens <= DECODE:
            goals.append(Goal("idle", *about, row.idle - row.empty, IDLE_LIMIT))
            goals.append(Goal("steered", *about, row.steered - row.empty, STEERED_LIMIT))
            goals.append(Goal("biased", *about, row.biased - row.empty, STEERED_LIMIT))
        if row.tokens == PREFILL:
            goals.append(Goal("prefill", *about, row.steered / row.copy, COPY_LIMIT))
    return goals
