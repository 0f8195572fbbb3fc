"""What `serve.py` found, as Markdown to paste."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PASSED, FAILED, NOT_MEASURED = 0, 1, 2
GOAL = 0.99
"""Share of stock vLLM's throughput that must be left when every request is steered."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Generated tokens per second in one round."""

    stock: float
    idle: float
    steered: float


@dataclass(frozen=True, slots=True)
class ServeReport:
    """Checks by what they say, and speeds round by round; `gpu` is None on a machine without one."""

    gpu: str | None
    setting: Mapping[str, object]
    checks: Mapping[str, bool]
    speeds: Sequence[Speed]

    @property
    def right(self) -> bool:
        """Whether every check held, and there was one."""
        return bool(self.checks) and all(self.checks.values())

    def share(self, kind: str) -> tuple[float, float, float]:
        """Median, least and most of the rounds' throughput as a share of stock's in the same round."""
        shares = [getattr(speed, kind) / speed.stock for speed in self.speeds]
        return statistics.median(shares), min(shares), max(shares)

    @property
    def exit_status(self) -> int:
        """A machine without a GPU never passes."""
        if not self.right:
            return FAILED
        if self.gpu is None:
            return NOT_MEASURED
        return PASSED if self.speeds and self.share("steered")[0] >= GOAL else FAILED

    def to_markdown(self) -> str:
        """The report."""
        lines = [f"# {self.gpu or 'CPU: not a GPU measurement'}", ""]
        lines += ["; ".join(f"{name} {value}" for name, value in self.setting.items()), ""]
        lines += [f"* {'yes' if held else '**NO**'}: {check}" for check, held in self.checks.items()]
        if self.speeds:
            lines += ["", "| | tokens per second (median) | share of stock, round by round |", "|---|---|---|"]
            for kind in ("stock", "idle", "steered"):
                speed = statistics.median(getattr(each, kind) for each in self.speeds)
                middle, least, most = self.share(kind)
                lines.append(f"| {kind} | {speed:.0f} | {middle:.3f} [{least:.3f}, {most:.3f}] |")
            if self.gpu is not None:
                met = self.share("steered")[0] >= GOAL
                lines += ["", f"Goal: all-steered keeps {GOAL} of stock: {'met' if met else '**NOT MET**'}."]
        return "\n".join(lines) + "\n"
