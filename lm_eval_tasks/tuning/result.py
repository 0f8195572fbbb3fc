"""What a search leaves: the recommended profile as JSON, the Pareto front, and the reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from expert_registry.registry import Found
from lm_eval_tasks.compare.comparison import Comparison, compare
from lm_eval_tasks.compare.dose import curves
from lm_eval_tasks.compare.report import write_report
from lm_eval_tasks.compare.run_file import Run, write_run
from lm_eval_tasks.tuning.run import Goal
from lm_eval_tasks.tuning.search import Limits, Tried, front, recommend


def print_front(tried: Sequence[Tried], limits: Limits) -> Tried | None:
    """Show the Pareto front; returns the recommended setting, if any."""
    chosen = recommend(tried, limits)
    table = Table("", "setting", "phase", "gain", "worst control", "KL", title=f"Pareto front of {len(tried)}")
    shown = {*front(tried), *([tried.index(chosen)] if chosen else [])}
    for i in sorted(shown, key=lambda i: -tried[i].gain):
        one = tried[i]
        mark = "recommended" if one is chosen else ""
        kl = "" if one.kl is None else f"{one.kl:.4f}"
        numbers = f"{100 * one.gain:+.1f}", f"{100 * one.control:+.1f}", kl
        table.add_row(mark, one.setting.label, one.setting.phase, *numbers)
    Console().print(table)
    return chosen


def store_search(out: Path, goal: Goal, whole: Run, *, plot: bool) -> None:
    """Write `tuning/run.json`, and beside it the report on the tuning documents, if there is a dose-response curve."""
    comparison = compare(whole, margin=goal.limits.margin)
    if curves(comparison):
        write_report(comparison, out / "tuning", plots=plot, max_kl=goal.limits.max_kl)
        write_run(whole, out / "tuning" / "run.json")


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
    chosen = recommend(tried, goal.limits)
    value: dict[str, Any] = {
        "ranking": found.entry.name,
        "sha256": found.sha256,
        "goal": asdict(goal),
        "tried": [asdict(one) for one in tried],
        "front": front(tried),
        "recommended": None,
    }
    if chosen is not None:
        profile = chosen.setting.profile(found.ranking, goal.reverse)
        value["recommended"] = {
            **asdict(chosen.setting),
            "request": goal.text(found, chosen.setting),
            "profile": json.loads(profile.to_json()),
            "digest": profile.digest,
        }
    if comparison is not None:
        value["test"] = comparison.to_dict()
    (out / "tuned.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    if run is not None and comparison is not None:
        write_run(run, out / "test-run.json")
        write_report(comparison, out, plots=plot)
    if plot:
        from lm_eval_tasks.compare.plots import draw_front

        points = [(one.gain, one.control, one.kl, one.setting.label) for one in tried]
        index = None if chosen is None else tried.index(chosen)
        draw_front(points, front(tried), index, (goal.limits.margin, goal.limits.max_kl), out / "front.png")
