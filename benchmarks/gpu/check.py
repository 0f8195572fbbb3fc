"""Is the GPU path right, is it right inside a CUDA graph, and what does it cost?

    python -m benchmarks.gpu.check [--out FOLDER]      # `make gpu-check`
    python -m benchmarks.gpu.check --interpret         # correctness only, on any machine with Triton

Needs torch, Triton and this repository; neither vLLM nor a network. Exit status: 0 all passed and every goal
met, 1 not so, 2 not measured because there is no GPU. A machine without a GPU never passes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.outcome import Outcome

PASSED, FAILED, NOT_MEASURED = 0, 1, 2
RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--interpret", action="store_true", help="correctness only, in Triton's interpreter")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file and the table")
    options = parser.parse_args(arguments)
    if options.interpret:
        return _interpret()
    if not torch.cuda.is_available():
        say("not measured: no GPU")
        return NOT_MEASURED
    return measure(torch.device("cuda", torch.cuda.current_device()), options.out)


def say(text: str) -> None:
    """One line of progress or result."""
    print(text, flush=True)  # noqa: T201


def report_failures(outcomes: Sequence[Outcome]) -> None:
    """Name each check that failed, and how many passed."""
    for outcome in outcomes:
        if not outcome.passed:
            say(f"FAILED {outcome.name}: {outcome.fault}")
    say(f"{sum(outcome.passed for outcome in outcomes)} of {len(outcomes)} checks passed")


def _interpret() -> int:
    from benchmarks.gpu.interpreter import use_interpreter

    use_interpreter()
    from benchmarks.gpu.correctness import check_count, check_rewrite, few_cases, few_counts
    from vllm_steermoe_plugin.kernels.counting import count
    from vllm_steermoe_plugin.kernels.rewriting import rewrite

    cpu = torch.device("cpu")
    outcomes = [check_rewrite(rewrite, cpu, case) for case in few_cases()]
    outcomes += [check_count(count, cpu, *case) for case in few_counts()]
    report_failures(outcomes)
    say("correctness in Triton's interpreter on a CPU; not measured: no GPU was used")
    return PASSED if all(outcome.passed for outcome in outcomes) else FAILED


def measure(device: torch.device, folder: Path) -> int:
    """Everything, on `device`; the exit status."""
    from benchmarks.gpu import graphs, machine, memory, timing
    from benchmarks.gpu.correctness import all_cases, all_counts, check_count, check_rewrite
    from benchmarks.gpu.goals import judge
    from benchmarks.gpu.report import Report, write_report
    from vllm_steermoe_plugin.ops import count_, rewrite_

    def rewrite(logits: torch.Tensor, rules: torch.Tensor, slots: torch.Tensor, row: int) -> None:
        rewrite_(logits, rules, slots, torch.ones(rules.shape[1], dtype=torch.bool, device=device), row)

    started = time.monotonic()

    def since() -> str:
        return f"[{time.monotonic() - started:.0f} s]"

    say(f"{since()} correctness")
    outcomes = [check_rewrite(rewrite, device, case) for case in all_cases()]
    outcomes += [check_count(count_, device, *case) for case in all_counts()]
    say(f"{since()} CUDA graphs, copies in flight, torch.compile")
    outcomes += graphs.check_all(device)
    report_failures(outcomes)
    say(f"{since()} memory")
    footprints = memory.measure(device)
    say(f"{since()} time")
    rows = timing.measure(device)
    report = Report(machine.describe(), outcomes, rows, footprints, judge(rows))
    say(write_report(report, folder))
    say(f"{since()} {'passed' if report.passed else 'FAILED'}; written to {folder}")
    return PASSED if report.passed else FAILED


if __name__ == "__main__":
    sys.exit(main())
