"""`benchmarks.gpu.check` with stand-ins for what only a GPU has: every part runs, nothing is measured.

Kernels are interpreted, a CUDA graph is the same work done again, and events read the host's clock.
"""

# The interpreter must be on before a kernel is imported.
# ruff: noqa: E402

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from benchmarks.gpu.interpreter import use_interpreter

use_interpreter()

import torch

from benchmarks.gpu import check, correctness, graphs, host_time, models, other_tiles, selections, timing, warmed_up
from benchmarks.gpu.correctness import Case
from benchmarks.gpu.outcome import Outcome


class Replayed:
    """Stands in for a CUDA graph."""

    def __init__(self, run: Callable[[], None]) -> None:
        run()
        self.replay = run


class HostClock:
    """Stands in for a CUDA event."""

    def __init__(self, *, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: HostClock) -> float:
        return 1000 * (end.at - self.at)


def pretend() -> None:
    """Put the stand-ins into place, and leave few and small cases."""
    check.find_device = lambda: torch.device("cpu")
    graphs.capture = timing.capture = Replayed  # type: ignore[assignment, attr-defined]
    for name in ("synchronize", "_sleep", "empty_cache", "set_sync_debug_mode"):
        setattr(torch.cuda, name, lambda *_: None)
    torch.cuda.get_sync_debug_mode = lambda: 0
    torch.cuda.Event = HostClock  # type: ignore[misc, assignment]
    graphs.COMPILER = "aot_eager"
    correctness.all_cases = lambda: iter([Case(4, 8, 2, 2, torch.float32), Case(3, 60, 4, 2, torch.bfloat16)])
    correctness.all_counts = lambda: iter([(5, 8, 2, torch.int32)])
    few = models.OTHER_ROUTERS[-1]
    selections.all_cases = lambda: iter([selections.SelectionCase(4, few, torch.float32)])
    # The interpreter compiles nothing; the real thing is in tests/gpu/kernel_launches.py.
    warmed_up.check_warm_up = lambda device: Outcome("everything is compiled before a capture")
    timing.LAUNCHES, timing.REPLAYS, timing._WAKING, timing._BIG_COPY = 2, 2, 1, 1 << 12
    graphs.STEPS = 8
    timing.STEPS, timing.DTYPES, timing.COLD_STEPS = (1, 8), (torch.bfloat16,), (1,)
    timing._MORE_THAN_CACHE, timing._WARM_UP_SECONDS = 1 << 12, 0.0
    timing.MODELS = models.MODELS[2:3]
    timing.SELECTION_STEPS, timing.SELECTIONS = (2,), ((few,), torch.float32)
    host_time._REPEATS = 4
    other_tiles.STEPS, other_tiles.EXPERTS, other_tiles.LAYERS = (8,), (8,), 2


if __name__ == "__main__":
    pretend()
    sys.exit(check.main(sys.argv[1:]))
