"""The plot of dose-response curves."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lm_eval_tasks.compare.dose import DIVERGENCE, Curve, Dose, Response

EDGE = 2.0
"""Forced experts stand at this multiple of the largest strength: apart, for they have none."""

_LINEAR = 0.001
"""Divergences up to it, in nats, are drawn in proportion, larger ones by their logarithm."""


def draw_curves(
    curves: Sequence[Curve], controls: Collection[str], margin: float, path: Path, max_kl: float | None = None
) -> None:
    """Each task's main metric, and the divergence, against strength: a panel each, with a colour for each curve.

    Args:
        curves: at least one.
        controls: tasks whose margin is drawn.
        margin: what a control may lose.
        path: PNG to write.
        max_kl: the largest divergence that counts as held, where there is one.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(one.task for curve in curves for dose in curve.doses for one in dose.responses))
    strengths = sorted({dose.strength for curve in curves for dose in curve.doses if dose.strength})
    least, most = min(map(abs, strengths)), max(map(abs, strengths))
    figure = Figure(figsize=(8.5, 0.7 + 2.2 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), sharex=True, squeeze=False)[:, 0]
    for task, axes in zip(tasks, panels, strict=True):
        for number, curve in enumerate(curves):
            _draw(axes, curve, task, f"C{number % 10}", EDGE * most)
        axes.set_xscale("symlog", linthresh=least, linscale=0.5)
        axes.set_ylabel(task.removeprefix("steermoe_").replace(" ", "\n"), fontsize=8)
        if task == DIVERGENCE:
            axes.set_yscale("symlog", linthresh=_LINEAR)
            axes.set_ylim(bottom=0)
        axes.axvline(0, color="0.85", linewidth=1, zorder=0)
        limit = max_kl if task == DIVERGENCE else _limit(curves, task, margin) if task in controls else None
        if limit is not None:
            axes.axhline(limit, color="0.6", linewidth=1, linestyle=":")
    ticks = {0.0: "0", **{side * x: f"{side * x:g}" for side in (-1, 1) for x in _apart(strengths, side)}}
    forced = [dose for curve in curves for dose in curve.doses if dose.strength is None]
    ticks |= {_place(dose, EDGE * most): dose.label.replace(", ", "\n") for dose in forced}
    panels[-1].set_xticks(list(ticks), list(ticks.values()), fontsize=7)
    panels[-1].set_xticks([], minor=True)
    panels[-1].set_xlabel(
        "strength (standard deviations of a token's router logits, for a weight of 1); bars: 95 %, paired\n"
        "grey: random controls of the same norm; dotted: limits; stars: forced experts, which have no strength",
        fontsize=8,
    )
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=75, metadata={"Software": None})


def _apart(strengths: Sequence[float], side: int) -> list[float]:
    """Those of one sign whose labels do not run into each other."""
    kept: list[float] = []
    for x in sorted(side * one for one in strengths if side * one > 0):
        if not kept or x >= 1.4 * kept[-1]:
            kept.append(x)
    return kept


def _draw(axes: Any, curve: Curve, task: str, colour: str, edge: float) -> None:
    found = [(dose, one) for dose in curve.doses for one in dose.responses if one.task == task]
    for dose, one in found:
        x = _place(dose, edge)
        axes.plot([x, x], [_level(one, end) for end in (one.change.low, one.change.high)], color=colour)
        axes.plot([x], [_level(one, one.change.value)], "*" if dose.strength is None else "o", color=colour)
        axes.plot([x] * len(one.random), [_level(one, end) for end in one.random], "_", color="0.5", markersize=9)
    line = [(_place(dose, edge), one) for dose, one in found if dose.strength is not None]
    # Names may hold what matplotlib would read as mathematics.
    label = curve.name.replace("$", r"\$")
    axes.plot([x for x, _ in line], [_level(one, one.change.value) for _, one in line], color=colour, label=label)
    for side in (-1, 1):
        drawn = [(x, one) for x, one in line if one.random and x * side > 0]
        ends = [[_level(one, end(one.random)) for _, one in drawn] for end in (min, max)]
        axes.fill_between([x for x, _ in drawn], *ends, color="0.9", zorder=0)


def _place(dose: Dose, edge: float) -> float:
    return (-edge if dose.away else edge) if dose.strength is None else dose.strength


def _level(one: Response, change: float) -> float:
    """The metric after a change of it, in percent; a divergence as it is."""
    return change if one.task == DIVERGENCE else 100 * (one.value - one.change.value + change)


def _limit(curves: Sequence[Curve], task: str, margin: float) -> float:
    """What a control may fall to."""
    before = next(one for curve in curves for dose in curve.doses for one in dose.responses if one.task == task)
    return _level(before, -margin)
