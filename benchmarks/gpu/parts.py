"""The parts of the check, each run in a process of its own. Needs a GPU.

An error that spoils a CUDA context, a compiler that hangs and a limit of time then cost one part and not the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.records import Record

_TOGETHER = 15
"""Cases in a row that a share takes: those of one model and dtype."""
_GIVE_UP = 20
"""Failed checks after which a part ends: a spoilt CUDA context fails all that follow."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the check.

    Attributes:
        name: as on the command line.
        seconds: it may take at most.
        run: gives its records on a device; the share `(i, n)` is every n-th group of cases from the i-th on.
        shares: processes that share its cases.
    """

    name: str
    seconds: float
    run: Callable[[torch.device, tuple[int, int]], Iterator[Record]]
    shares: int = 1


def attempt(name: str, check: Callable[[], Record]) -> Record:
    """What `check` finds; if it raises, that is its fault."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - the report names it, and the check has failed
        return Outcome(name, f"{type(error).__name__}: {str(error)[-1500:]}")


def run_checks(checks: Iterable[tuple[str, Callable[[], Record]]]) -> Iterator[Record]:
    """What each named check or measurement finds, until too many have failed."""
    failed = 0
    for name, check in checks:
        found = attempt(name, check)
        yield found
        failed += isinstance(found, Outcome) and not found.passed
        if failed == _GIVE_UP:
            yield Outcome("the checks after these", f"{failed} have failed, so no more were made")
            return


def _correctness(device: torch.device, share: tuple[int, int]) -> Iterator[Record]:
    from benchmarks.gpu.correctness import all_cases, all_counts, check_count, check_rewrite
    from benchmarks.gpu.selections import all_cases as all_selections
    from benchmarks.gpu.selections import check_reselect
    from vllm_steermoe_plugin.device.kernels.reselecting import reselect
    from vllm_steermoe_plugin.device.ops import count_, rewrite_

    def rewrite(*given: Any, forces: bool = True) -> None:
        rewrite_(*given, False, forces)

    def checks() -> Iterator[tuple[str, Callable[[], Outcome]]]:
        for case in all_cases():
            yield str(case), partial(check_rewrite, rewrite, device, case)
        for counted in all_counts():
            yield f"count {counted}", partial(check_count, count_, device, *counted)
        for selection in all_selections():
            yield str(selection), partial(check_reselect, reselect, device, selection)

    index, number = share
    # Neighbours need the same kernels, which each process compiles for itself.
    yield from run_checks(check for at, check in enumerate(checks()) if at // _TOGETHER % number == index)


def _graphs(device: torch.device, share: tuple[int, int]) -> Iterator[Record]:
    from benchmarks.gpu import graphs, warmed_up

    yield from run_checks([*graphs.all_checks(device), ("warm-up", partial(warmed_up.check_warm_up, device))])


def _compile(device: torch.device, share: tuple[int, int]) -> Iterator[Record]:
    from benchmarks.gpu import graphs

    yield from run_checks([("torch.compile", partial(graphs.check_compile, device))])


def _memory(device: torch.device, share: tuple[int, int]) -> Iterator[Record]:
    from benchmarks.gpu import memory

    yield from memory.measure(device)


def _host(device: torch.device, share: tuple[int, int]) -> Iterator[Record]:
    from benchmarks.gpu import host_time

    yield from host_time.measure(device)


def _time(device: torch.device, share: tuple[int, int]) -> Iterator[Record]:
    from benchmarks.gpu import timing

    for record in run_checks(timing.all_rows(device)):
        yield record
        torch.cuda.empty_cache()


def _selection(device: torch.device, share: tuple[int, int]) -> Iterator[Record]:
    from benchmarks.gpu import timing

    yield from run_checks(timing.selection_rows(device))


def _tiles(device: torch.device, share: tuple[int, int]) -> Iterator[Record]:
    from benchmarks.gpu import other_tiles

    yield from run_checks(other_tiles.all_rows(device))


PARTS = (
    Part("correctness", 240, _correctness, shares=4),
    Part("graphs", 90, _graphs),
    Part("memory", 45, _memory),
    Part("host", 45, _host),
    Part("time", 200, _time),
    Part("selection", 60, _selection),
    Part("compile", 120, _compile),
    Part("tiles", 120, _tiles),
)
"""In their order: what everything else rests on, then what the goals are judged by."""
