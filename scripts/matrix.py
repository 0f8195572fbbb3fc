"""The engine's tests with each supported vLLM and each of its model runners; writes `tests/MATRIX.md`.

    python -m scripts.matrix [--only VERSION-RUNNER ...] [--keep] [--again] [-- PYTEST ARGUMENTS]      # `make test-all`

Each run is a pytest of its own, in the environment of that vLLM (`make setup`, `make next`). `--keep` takes the results
of earlier runs for those that are not named; `--again` runs of earlier results what failed. Exit status 1 if any test
failed or a run is missing.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "out/matrix"
TABLE = ROOT / "tests/MATRIX.md"
ENGINE = ("tests/engine", "tests/served", "tests/plugin")
"""Folders whose tests meet vLLM and its model runners."""
WITH_VLLM = (*ENGINE, "tests/evaluation")
"""Those that meet vLLM at all. Evaluation is run with V1 alone: it is about lm-eval, in many thousand steps."""


@dataclass(frozen=True)
class Cell:
    """One vLLM with one runner: where its Python is, and which tests it runs."""

    vllm: str
    runner: str
    python: str
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        """As in `--only`."""
        return f"{self.vllm}-{self.runner}"

    @property
    def record(self) -> Path:
        """Where pytest leaves what it found."""
        return RESULTS / f"{self.name}.xml"

    def run(self, arguments: Sequence[str]) -> None:
        """Run the tests; their outcomes are in the record."""
        self.record.with_suffix(".txt").write_text(" ".join(arguments))
        self._run(self.tests, self.record, arguments)

    def run_again(self, arguments: Sequence[str]) -> None:
        """Run what failed, and put its outcomes in place of the earlier ones."""
        failed, record = read(self.record).failed, self.record.with_suffix(".again.xml")
        if not failed:
            return
        self._run(failed, record, arguments)
        tree = ElementTree.parse(self.record)
        now = {_id(case): case for case in ElementTree.parse(record).getroot().iter("testcase")}
        for suite in tree.getroot().iter("testsuite"):
            for at, case in enumerate(list(suite)):
                if case.tag == "testcase" and _id(case) in failed and _id(case) in now:
                    suite[at] = now[_id(case)]
        tree.write(self.record)

    def _run(self, tests: Sequence[str], record: Path, arguments: Sequence[str]) -> None:
        command = [ROOT / self.python, "-m", "pytest", "-n", "2", "--dist", "loadfile", *tests]
        command += [f"--junitxml={record}", "-o", "junit_family=xunit1", *arguments]
        environment = os.environ | {"STEERMOE_TEST_RUNNER": self.runner}
        subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, check=False)


NOW, NEXT = ".venv/bin/python", ".cache/vllm-next/bin/python"
CELLS = (
    Cell("0.32", "v1", NOW, ("tests",)),
    Cell("0.32", "v2", NOW, ENGINE),
    Cell("0.33", "v2", NEXT, ENGINE),
    Cell("0.33", "v1", NEXT, WITH_VLLM),
)


@dataclass
class Found:
    """What a run found: file -> outcome -> how many; reasons of skips; seconds; what pytest was asked for besides."""

    files: dict[str, Counter[str]]
    reasons: Counter[str]
    failed: list[str]
    seconds: float
    arguments: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for and write the table; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m scripts.matrix", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="*", choices=[cell.name for cell in CELLS], default=None)
    parser.add_argument("--keep", action="store_true", help="use earlier results of the others")
    parser.add_argument("--again", action="store_true", help="of earlier results only what failed")
    parser.add_argument("pytest", nargs="*", help="after --, for pytest")
    options = parser.parse_args(arguments)
    RESULTS.mkdir(parents=True, exist_ok=True)
    chosen = [cell for cell in CELLS if options.only is None or cell.name in options.only]
    for cell in CELLS:
        if not options.again and (cell in chosen or not options.keep):
            cell.record.unlink(missing_ok=True)
    for cell in chosen:
        started = time.monotonic()
        (cell.run_again if options.again else cell.run)(options.pytest)
        sys.stdout.write(f"{cell.name}: {time.monotonic() - started:.0f} s\n")
    found = {cell.name: read(cell.record) for cell in CELLS if cell.record.exists()}
    TABLE.write_text(table(found))
    sys.stdout.write(table(found))
    return int(len(found) < len(CELLS) or any(run.failed for run in found.values()))


def read(record: Path) -> Found:
    """A JUnit file of pytest."""
    files: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: Counter[str] = Counter()
    failed = []
    root = ElementTree.parse(record).getroot()
    for case in root.iter("testcase"):
        file = _id(case).partition("::")[0]
        outcome = "passed"
        for child in case:
            if child.tag in ("failure", "error"):
                outcome = "FAILED"
                failed.append(_id(case))
            elif child.tag == "skipped" and outcome == "passed":
                outcome = "skipped"
                reasons[str(child.get("message")).removeprefix("Skipped: ")] += 1
        files[file][outcome] += 1
    seconds = sum(float(suite.get("time", 0)) for suite in root.iter("testsuite"))
    asked = record.with_suffix(".txt")
    return Found(files, reasons, failed, seconds, asked.read_text() if asked.exists() else "")


def _id(case: ElementTree.Element) -> str:
    """As pytest takes it."""
    file = case.get("file") or str(case.get("classname")).replace(".", "/") + ".py"
    return f"{file}::{case.get('name')}"


def table(found: Mapping[str, Found]) -> str:
    """Markdown: a line for each file, a column for each run; below, why tests were skipped and which failed."""
    lines = ["# What was run with which vLLM and which model runner", ""]
    lines += [
        f"Made by `python -m scripts.matrix` on {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, on a CPU "
        f"({platform.machine()}, {os.cpu_count()} cores). V2 runs in Triton's interpreter (`tests/support/runner_v2`), "
        "0.33 over the compiled kernels of 0.32 (`scripts/setup_next.py`). `evaluation` is about lm-eval, in thousands "
        "of steps, and runs with V1. Each cell: tests passed, + skipped.",
        "",
        "| file | " + " | ".join(found) + " |",
        "|---" * (1 + len(found)) + "|",
    ]
    for file in sorted({file for run in found.values() for file in run.files}):
        if file.startswith(WITH_VLLM):
            cells = (_cell(run.files.get(file, Counter())) for run in found.values())
            lines.append(f"| {file.removeprefix('tests/')} | " + " | ".join(cells) + " |")
    others = (_cell(_sum(run, inside=False)) for run in found.values())
    lines.append("| all other files | " + " | ".join(others) + " |")
    totals = (f"{_cell(_sum(run) + _sum(run, inside=False))}, {run.seconds / 60:.0f} min" for run in found.values())
    lines += ["| **all** | " + " | ".join(totals) + " |", ""]
    lines += [f"* {name} was run with `{run.arguments}`" for name, run in found.items() if run.arguments]
    for name, run in found.items():
        lines += [f"* {name} skipped {number}: {reason}" for reason, number in run.reasons.most_common()]
        lines += [f"* {name} FAILED {test}" for test in run.failed]
    return "\n".join(lines) + "\n"


def _sum(run: Found, *, inside: bool = True) -> Counter[str]:
    counts = (count for file, count in run.files.items() if file.startswith(WITH_VLLM) == inside)
    return sum(counts, Counter())


def _cell(count: Counter[str]) -> str:
    text = str(count["passed"]) if count else ""
    text += f" + {count['skipped']}" if count["skipped"] else ""
    return text + (f", {count['FAILED']} FAILED" if count["FAILED"] else "")


if __name__ == "__main__":
    sys.exit(main())
