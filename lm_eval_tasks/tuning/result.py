"""What a search leaves: the recommended profile as JSON, the Pareto front, and the report on the test documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from expert_registry.registry import Found
from lm_eval_tasks.compare.comparison import Comparison
from lm_eval_tasks.compare.report import write_report
from lm_eval_tasks.compare.run_file import Run, write_run
from lm_eval_tasks.tuning.run import Goal
from lm_eval_tasks.tuning.search import Tried, front, recommend
from vllm_steermoe_plugin.steering.selection import select_experts


def print_front(tried: Sequence[Tried], margin: float) -> Tried | None:
    """Show the Pareto front; returns the recommended setting, if any."""
    chosen = recommend(tried, margin)
    table = Table("", "activate", "deactivate", "phase", "gain", "worst control", title=f"Pareto front of {len(tried)}")
    shown = {*front(tried), *([tried.index(chosen)] if chosen else [])}
    for i in sorted(shown, key=lambda i: -tried[i].gain):
        one = tried[i]
        mark = "recommended" if one is chosen else ""
        row = (one.setting.activate, one.setting.deactivate, one.setting.phase)
        table.add_row(mark, *map(str, row), f"{100 * one.gain:+.1f}", f"{100 * one.control:+.1f}")
    Console().print(table)
    return chosen


def store(
    out: Path,
    goal: Goal,
    found: Found,
    tried: Sequence[Tried],
    run: Run | None,
    comparison: Comparison | None,
    *,
    plot: bool,
) -> None:
    """Write `tuned.json`, `front.png`, and where there is something to judge `test-run.json` and the report."""
    chosen = recommend(tried, goal.margin)
    value: dict[str, Any] = {
        "ranking": found.entry.name,
        "sha256": found.sha256,
        "goal": asdict(goal),
        "tried": [asdict(one) for one in tried],
        "front": front(tried),
        "recommended": None,
    }
    if chosen is not None:
        setting = chosen.setting
        selection = select_experts(
            found.ranking,
            activate=setting.activate,
            deactivate=setting.deactivate,
            reverse=goal.reverse,
            phase=setting.phase,
        )
        value["recommended"] = {
            **asdict(setting),
            "request": goal.text(found, setting),
            "profile": json.loads(selection.profile.to_json()),
            "digest": selection.profile.digest,
        }
    if comparison is not None:
        value["test"] = comparison.to_dict()
    (out / "tuned.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    if run is not None and comparison is not None:
        write_run(run, out / "test-run.json")
        write_report(comparison, out, plots=plot)
    if plot:
        from lm_eval_tasks.compare.plots import draw_front

        points = [(one.gain, one.control, f"{one.setting.activate}/{one.setting.deactivate}") for one in tried]
        index = None if chosen is None else tried.index(chosen)
        draw_front(points, front(tried), index, goal.margin, out / "front.png")
