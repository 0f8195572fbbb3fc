"""The report: a JSON file with everything, and a Markdown table to read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu.goals import Goal
from benchmarks.gpu.memory import Footprint
from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.rows import Row


@dataclass(frozen=True, slots=True)
class Report:
    """What one run of the check found."""

    machine: Mapping[str, str]
    outcomes: Sequence[Outcome]
    rows: Sequence[Row]
    footprints: Sequence[Footprint]
    goals: Sequence[Goal]

    @property
    def passed(self) -> bool:
        """Whether something was checked and judged, all of it was right and every goal was met."""
        return (
            bool(self.outcomes and self.goals)
            and all(outcome.passed for outcome in self.outcomes)
            and all(goal.met for goal in self.goals)
        )

    def to_json(self) -> str:
        """Everything; goals with their verdicts."""
        document = {
            "passed": self.passed,
            "machine": dict(self.machine),
            "checks": [asdict(outcome) for outcome in self.outcomes],
            "microseconds_per_layer": [asdict(row) for row in self.rows],
            "bytes": [asdict(footprint) for footprint in self.footprints],
            "goals": [{**asdict(goal), "met": goal.met} for goal in self.goals],
        }
        return json.dumps(document, indent=1) + "\n"

    def to_markdown(self) -> str:
        """Machine, verdicts, times, memory."""
        failed = [outcome for outcome in self.outcomes if not outcome.passed]
        missed = [goal for goal in self.goals if not goal.met]
        return "\n\n".join(
            [
                f"# {self.machine['gpu']}, {self.machine['date']}",
                "; ".join(f"{name} {value}" for name, value in self.machine.items() if name not in ("gpu", "date")),
                f"{len(self.outcomes) - len(failed)} of {len(self.outcomes)} checks passed; "
                f"{len(self.goals) - len(missed)} of {len(self.goals)} goals met.",
                *(f"* FAILED {outcome.name}: {outcome.fault}" for outcome in failed),
                *(f"* {goal}" for goal in missed),
                "Microseconds per layer in a CUDA graph of many launches:",
                _table(
                    ("model", "T", "dtype", "empty kernel", "idle", "steered elsewhere", "steered",
                     "copy of the bytes", "bytes at full bandwidth", "count, none", "count, all"),
                    [
                        (row.model, row.tokens, row.dtype,
                         *(f"{x:.2f}" for x in (row.empty, row.idle, row.elsewhere, row.steered, row.copy,
                                                row.at_bandwidth, row.count_idle, row.count)))
                        for row in self.rows
                    ],
                ),
                "MiB of one worker's buffers (256 requests, 8192 tokens in a step):",
                _table(
                    ("model", "on the device", "allocated", "pinned on the host"),
                    [
                        (each.model, *(f"{x / 2**20:.2f}" for x in (each.buffers, each.allocated, each.pinned)))
                        for each in self.footprints
                    ],
                ),
            ]
        ) + "\n"  # fmt: skip


def write_report(report: Report, folder: Path) -> str:
    """Write `GPU-DATE.json` and `.md` into `folder`; the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    gpu = re.sub(r"[^a-z0-9]+", "-", report.machine["gpu"].split("(")[0].lower()).strip("-")
    name = f"{gpu}-{report.machine['date']}"
    markdown = report.to_markdown()
    (folder / f"{name}.json").write_text(report.to_json(), encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown, encoding="utf-8")
    return markdown


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
