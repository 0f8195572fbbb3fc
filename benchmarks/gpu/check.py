"""Is the GPU path right, is it right inside a CUDA graph, and what does it cost?

    python -m benchmarks.gpu.check [--out FOLDER] [--seconds N]      # `make gpu-check`
    python -m benchmarks.gpu.check --interpret                       # correctness only, on any machine with Triton

Needs torch, Triton and this repository; neither vLLM nor a network. Each part runs in a process of its own and has a
limit of time; what it finds is on disk at once, and the report is written anew after each. Exit status: 0 all passed
and every goal met, 1 not so, 2 not measured because there is no GPU. A machine without a GPU never passes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks.gpu.outcome import Outcome

PASSED, FAILED, NOT_MEASURED = 0, 1, 2
ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).parent / "results"
PROGRAM = (sys.executable, "-m", "benchmarks.gpu.check")
"""That runs a part."""
SECONDS = 500.0
"""For all of it; the rest of ten minutes is for importing torch anew from a cold disk, and for the report."""
_LEAST = 5.0
"""Seconds below which no part is started."""
_SHOWN = 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--interpret", action="store_true", help="correctness only, in Triton's interpreter")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for records, JSON file and table")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    parser.add_argument("--part", nargs=4, metavar=("NAME", "SHARE", "SHARES", "RECORDS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.interpret:
        return _interpret()
    device = find_device()
    if device is None:
        say("not measured: no GPU")
        return NOT_MEASURED
    if options.part:
        name, share, shares, records = options.part
        run_part(name, (int(share), int(shares)), device, Path(records))
        return PASSED
    return measure(options.out, options.seconds)


def find_device() -> torch.device | None:
    """The GPU, if there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def say(text: str) -> None:
    """One line of progress or result."""
    print(text, flush=True)  # noqa: T201


def report_failures(outcomes: Sequence[Outcome]) -> None:
    """Name the checks that failed, and how many passed."""
    failed = [outcome for outcome in outcomes if not outcome.passed]
    for outcome in failed[:_SHOWN]:
        say(f"FAILED {outcome.name}: {outcome.fault}")
    if len(failed) > _SHOWN:
        say(f"... and {len(failed) - _SHOWN} more")
    say(f"{len(outcomes) - len(failed)} of {len(outcomes)} checks passed")


def _interpret() -> int:
    from benchmarks.gpu.interpreter import use_interpreter

    use_interpreter()
    from benchmarks.gpu.correctness import check_count, check_rewrite, few_cases, few_counts
    from benchmarks.gpu.selections import check_reselect
    from benchmarks.gpu.selections import few_cases as few_selections
    from vllm_steermoe_plugin.device.kernels.counting import count
    from vllm_steermoe_plugin.device.kernels.reselecting import reselect
    from vllm_steermoe_plugin.device.kernels.rewriting import rewrite

    cpu = torch.device("cpu")
    outcomes = [check_rewrite(rewrite, cpu, case) for case in few_cases()]
    outcomes += [check_count(count, cpu, *case) for case in few_counts()]
    outcomes += [check_reselect(reselect, cpu, case) for case in few_selections()]
    report_failures(outcomes)
    say("correctness in Triton's interpreter on a CPU; not measured: no GPU was used")
    return PASSED if all(outcome.passed for outcome in outcomes) else FAILED


def run_part(name: str, share: tuple[int, int], device: torch.device, records: Path) -> None:
    """One part, in this process; every record is on disk before the next is made."""
    from benchmarks.gpu.parts import PARTS
    from benchmarks.gpu.records import append

    (part,) = (part for part in PARTS if part.name == name)
    for record in part.run(device, share):
        append(records, record)


def measure(folder: Path, seconds: float, program: Sequence[str] = PROGRAM) -> int:
    """All parts, each in processes of its own; the exit status."""
    from benchmarks.gpu import machine
    from benchmarks.gpu.parts import PARTS
    from benchmarks.gpu.records import append, read
    from benchmarks.gpu.report import make_report, report_name, write_report

    started = time.monotonic()
    facts = machine.describe()
    folder.mkdir(parents=True, exist_ok=True)
    records = folder / f"{report_name(facts)}.jsonl"
    records.unlink(missing_ok=True)
    for index, part in enumerate(PARTS):
        past = time.monotonic() - started
        limit = min(part.seconds, seconds - past)
        say(f"[{past:.0f} s] {part.name}")
        if limit < _LEAST:
            append(records, Outcome(part.name, "there was no time left for it"))
        else:
            for fault in run_processes(part.name, part.shares, records, limit, program):
                say(f"FAILED {part.name}: {fault}")
                append(records, Outcome(part.name, fault))
        done = [each.name for each in PARTS[: index + 1]]
        report = make_report(facts, read(records), [each.name for each in PARTS if each.name not in done])
        text = write_report(report, folder)
    report_failures(report.outcomes)
    say(text)
    verdict = "passed" if report.passed else "FAILED"
    say(f"[{time.monotonic() - started:.0f} s] {verdict}; written to {folder}")
    return PASSED if report.passed else FAILED


def run_processes(name: str, shares: int, records: Path, seconds: float, program: Sequence[str]) -> list[str]:
    """Run a part in `shares` processes of `program` at once, for `seconds` at most; what went wrong with them."""
    deadline = time.monotonic() + seconds
    faults = []
    # References are computed on the CPU: threads of several processes would wait for each other at every barrier.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // shares))}
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for share in range(shares):
            messages = Path(folder) / f"{share}.txt"
            command = [*program, "--part", name, str(share), str(shares), str(records.resolve())]
            with messages.open("wb") as file:
                process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=os.environ | threads)
            running.append((messages, process))
        for messages, process in running:
            try:
                status = process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                # One that a hung driver holds does not even end then; the others still get their turn.
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)
                faults.append(f"stopped unfinished after {seconds:.0f} s")
                continue
            if status:
                said = messages.read_text(encoding="utf-8", errors="replace").strip()
                faults.append(f"ended with status {status}: {said[-1500:]}")
    return faults


if __name__ == "__main__":
    sys.exit(main())
