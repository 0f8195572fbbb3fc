"""Step 4 of the demo: the table, and the JSON that other tools read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lm_eval_tasks.compare.intervals import Interval, mean_over_draws, paired_change, rate
from lm_eval_tasks.compare.report import percent

Outcomes = list[float]


@dataclass(slots=True)
class Measured:
    """Outcomes of one behaviour's test split and of its control."""

    behaviour: dict[str, Outcomes] = field(default_factory=dict)
    """`unsteered`, `steered`, `reversed` -> outcomes."""
    control: dict[str, Outcomes] = field(default_factory=dict)
    random: list[Outcomes] = field(default_factory=list)
    """Outcomes under each draw of random experts."""
    random_control: list[Outcomes] = field(default_factory=list)

    def intervals(self) -> dict[str, Interval]:
        """The values of `demo.json`, by their names there."""
        return {
            **{name: rate(self.behaviour[name]) for name in ("unsteered", "steered", "reversed")},
            "random": mean_over_draws([rate(draw).value for draw in self.random]),
            **{f"control_{name}": rate(self.control[name]) for name in ("unsteered", "steered", "reversed")},
            "control_random": mean_over_draws([rate(draw).value for draw in self.random_control]),
        }

    def changes(self) -> dict[str, Interval]:
        """Paired change against unsteered; for `random` the mean absolute change over the draws."""
        before, control = self.behaviour["unsteered"], self.control["unsteered"]
        absolute = [abs(rate(draw).value - rate(before).value) for draw in self.random]
        return {
            "steered": paired_change(before, self.behaviour["steered"]),
            "reversed": paired_change(before, self.behaviour["reversed"]),
            "random": mean_over_draws(absolute),
            "control_steered": paired_change(control, self.control["steered"]),
            "control_reversed": paired_change(control, self.control["reversed"]),
        }


def print_table(measured: dict[str, Measured], console: Console) -> None:
    """Rates in percent with 95 % intervals, and the changes in points."""
    columns = ("unsteered", "steered", "reversed", "random")
    table = Table("", *columns, title="lm-eval, test splits: % with 95 % interval", title_justify="left")
    for name, one in measured.items():
        found = one.intervals()
        table.add_row(name, *(percent(found[column]) for column in columns))
        table.add_row("  control", *(percent(found[f"control_{column}"]) for column in columns), end_section=True)
    console.print(table)
    changes = Table(
        "",
        "steered",
        "reversed",
        "random (mean |change|)",
        "control steered",
        "control reversed",
        title="change against unsteered, in points, paired by example",
        title_justify="left",
    )
    for name, one in measured.items():
        changes.add_row(name, *(percent(interval, sign=key != "random") for key, interval in one.changes().items()))
    console.print(changes)


def write_json(measured: dict[str, Measured], seconds: dict[str, float], extra: dict[str, Any], path: Path) -> None:
    """Write `demo.json`."""
    behaviours = {}
    for name, one in measured.items():
        behaviours[name] = {
            **{key: interval.to_dict() for key, interval in one.intervals().items()},
            "change": {key: interval.to_dict() for key, interval in one.changes().items()},
            "random_draws": [rate(draw).value for draw in one.random],
        }
    value = {"behaviours": behaviours, "seconds": {k: round(v, 1) for k, v in seconds.items()}, **extra}
    path.write_text(json.dumps(value, indent=1) + "\n")
