"""The report: a JSON file with everything, and a Markdown table to read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu.goals import Goal, judge
from benchmarks.gpu.memory import Footprint
from benchmarks.gpu.models import MODELS
from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.records import Record
from benchmarks.gpu.rows import ColdTime, HostTime, Row, SelectionRow, TileTime

_LAYERS = {model.name: model.layers for model in MODELS}
_SHOWN = 30
"""Failed checks in the table; the JSON file has all."""


@dataclass(frozen=True, slots=True)
class Report:
    """What one run of the check found.

    Attributes:
        missing: parts that were not run (yet).
    """

    machine: Mapping[str, str]
    outcomes: Sequence[Outcome]
    rows: Sequence[Row]
    selections: Sequence[SelectionRow]
    cold: Sequence[ColdTime]
    footprints: Sequence[Footprint]
    host: Sequence[HostTime]
    tiles: Sequence[TileTime]
    missing: Sequence[str] = ()

    @property
    def goals(self) -> list[Goal]:
        """Every goal of every row."""
        return judge(self.rows)

    @property
    def passed(self) -> bool:
        """Whether something was checked and judged, nothing is missing, all was right and every goal was met."""
        return (
            bool(self.outcomes and self.goals)
            and not self.missing
            and all(outcome.passed for outcome in self.outcomes)
            and all(goal.met for goal in self.goals)
        )

    def to_json(self) -> str:
        """Everything; goals with their verdicts."""
        document = {
            "passed": self.passed,
            "missing": list(self.missing),
            "machine": dict(self.machine),
            "checks": [asdict(outcome) for outcome in self.outcomes],
            "microseconds_per_layer": [asdict(row) for row in self.rows],
            "microseconds_per_layer_of_a_correction": [asdict(row) for row in self.selections],
            "microseconds_over_an_empty_kernel_from_memory": [asdict(each) for each in self.cold],
            "bytes": [asdict(footprint) for footprint in self.footprints],
            "host_microseconds": [asdict(each) for each in self.host],
            "tiles": [asdict(tile) for tile in self.tiles],
            "goals": [{**asdict(goal), "met": goal.met} for goal in self.goals],
        }
        return json.dumps(document, indent=1) + "\n"

    def to_markdown(self) -> str:
        """Machine, verdicts, times, memory."""
        failed = [outcome for outcome in self.outcomes if not outcome.passed]
        goals = self.goals
        missed = [goal for goal in goals if not goal.met]
        return "\n\n".join(
            [
                f"# {self.machine['gpu']}, {self.machine['date']}",
                "; ".join(f"{name} {value}" for name, value in self.machine.items() if name not in ("gpu", "date")),
                f"{len(self.outcomes) - len(failed)} of {len(self.outcomes)} checks passed; "
                f"{len(goals) - len(missed)} of {len(goals)} goals met.",
                *([f"NOT RUN: {', '.join(self.missing)}."] if self.missing else []),
                *(f"* FAILED {each.name}: {' / '.join(str(each.fault).splitlines()[-2:])}" for each in failed[:_SHOWN]),
                *(f"* {goal}" for goal in missed),
                "Microseconds per layer in a CUDA graph of many launches (spread: of the middle half of the replays, "
                "in the column where it is largest):",
                _table(
                    ("model", "T", "dtype", "empty kernel", "idle", "steered elsewhere", "steered", "biased",
                     "copy of the bytes", "bytes at full bandwidth", "count, none", "count, all", "spread", "clock"),
                    [
                        (row.model, row.tokens, row.dtype,
                         *(f"{x:.2f}" for x in (row.empty, row.idle, row.elsewhere, row.steered, row.biased, row.copy,
                                                row.at_bandwidth, row.count_idle, row.count, row.spread)), row.clock)
                        for row in self.rows
                    ],
                ),
                "Microseconds of a step, all layers of the model, over a model without the kernel:",
                _table(
                    ("model", "T", "dtype", "idle", "steered"),
                    [(row.model, row.tokens, row.dtype, f"{layers * row.idle:.0f}", f"{layers * row.steered:.0f}")
                     for row in self.rows if (layers := _LAYERS.get(row.model))],
                ),
                "Microseconds per layer to correct a selection, in the same way (beside it the rewrite of the same "
                "logits; not judged):",
                _table(
                    ("model", "T", "dtype", "empty kernel", "idle", "steered elsewhere", "steered", "rewrite, steered",
                     "spread", "clock"),
                    [
                        (row.model, row.tokens, row.dtype,
                         *(f"{x:.2f}" for x in (row.empty, row.idle, row.elsewhere, row.steered, row.gate, row.spread)),
                         row.clock)
                        for row in self.selections
                    ],
                ),
                "Microseconds per layer over an empty kernel where slots, rules and logits come from memory (bfloat16; "
                "not judged):",
                _table(
                    ("model", "T", "idle", "steered"),
                    [(each.model, each.tokens, f"{each.idle:.2f}", f"{each.steered:.2f}") for each in self.cold],
                ),
                "MiB of one worker's buffers (256 requests, 8192 tokens in a step):",
                _table(
                    ("model", "on the device", "allocated", "pinned on the host"),
                    [
                        (each.model, *(f"{x / 2**20:.2f}" for x in (each.buffers, each.allocated, each.pinned)))
                        for each in self.footprints
                    ],
                ),
                "Microseconds of the host for a step (48 layers, 128 experts): preparing it, and launching the rewrite "
                "in steps that no CUDA graph holds:",
                _table(
                    ("step", "tokens", "microseconds"),
                    [(each.step, each.tokens, f"{each.microseconds:.0f}") for each in self.host],
                ),
                "Tiles (tokens x warps of a program), microseconds per layer, steered and idle:",
                _table(
                    ("E", "T", "dtype", "chosen", "steered", "idle", "best of all", "steered", "idle"),
                    _chosen_and_best(self.tiles),
                ),
            ]
        ) + "\n"  # fmt: skip


def make_report(machine: Mapping[str, str], records: Sequence[Record], missing: Sequence[str] = ()) -> Report:
    """The report of what the parts found."""
    return Report(
        machine,
        [each for each in records if isinstance(each, Outcome)],
        [each for each in records if isinstance(each, Row)],
        [each for each in records if isinstance(each, SelectionRow)],
        [each for each in records if isinstance(each, ColdTime)],
        [each for each in records if isinstance(each, Footprint)],
        [each for each in records if isinstance(each, HostTime)],
        [each for each in records if isinstance(each, TileTime)],
        missing,
    )


def report_name(machine: Mapping[str, str]) -> str:
    """Of its files: GPU and date."""
    gpu = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].split("(")[0].lower()).strip("-")
    return f"{gpu}-{machine['date']}"


def write_report(report: Report, folder: Path) -> str:
    """Write `GPU-DATE.json` and `.md` into `folder`; the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    name = report_name(report.machine)
    markdown = report.to_markdown()
    (folder / f"{name}.json").write_text(report.to_json(), encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown, encoding="utf-8")
    return markdown


def _chosen_and_best(tiles: Sequence[TileTime]) -> list[tuple[object, ...]]:
    groups: dict[tuple[int, int, str], list[TileTime]] = {}
    for tile in tiles:
        groups.setdefault((tile.experts, tile.tokens, tile.dtype), []).append(tile)
    rows: list[tuple[object, ...]] = []
    for about, group in groups.items():
        chosen = [tile for tile in group if tile.chosen]
        best = min(group, key=lambda tile: tile.steered)
        cells = [(f"{tile.rows} x {tile.warps}", f"{tile.steered:.2f}", f"{tile.idle:.2f}") for tile in (*chosen, best)]
        rows.append((*about, *(cell for some in cells for cell in some)))
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
