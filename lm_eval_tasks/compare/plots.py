"""Plots of a comparison and of a search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lm_eval_tasks.compare.comparison import Comparison


def draw_changes(comparison: Comparison, path: Path) -> None:
    """The change of every task's main metric with its interval; random draws as small marks.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    shown = [change for change in comparison.changes if change.main]
    profiles = list(dict.fromkeys(change.profile for change in shown))
    draws = {(one.task, one.profile): one.changes for one in comparison.random}
    figure = Figure(figsize=(8.5, 1.6 + 0.32 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for row, change in enumerate(shown):
        colour = f"C{profiles.index(change.profile) % 10}"
        points, low, high = (100 * v for v in (change.change.value, change.change.low, change.change.high))
        axes.plot([low, high], [row, row], color=colour, linewidth=2)
        axes.plot([points], [row], "s" if change.control else "o", color=colour)
        random = [100 * one for one in draws.get((change.task, change.profile), ())]
        axes.plot(random, [row] * len(random), "|", color="0.45")
    axes.axvline(0, color="0.6", linewidth=1)
    axes.axvline(-100 * comparison.margin, color="0.8", linewidth=1, linestyle=":")
    labels = [f"{c.task.removeprefix('steermoe_')} · {c.profile[:32]}" for c in shown]
    # Names may hold what matplotlib would read as mathematics.
    axes.set_yticks(range(len(shown)), [label.replace("$", r"\$") for label in labels], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("change in points; squares: controls, grey marks: random experts, dotted: margin", fontsize=8)
    figure.savefig(path, dpi=75, metadata={"Software": None})


def draw_front(
    points: Sequence[tuple[float, float, str]], front: Sequence[int], chosen: int | None, margin: float, path: Path
) -> None:
    """Gain against the worst change of a control, for each setting that a search tried.

    Args:
        points: gain, worst control change, label.
        front: indices that no other point beats in both.
        chosen: index of the recommended one.
        margin: what a control may lose.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([100 * p[1] for p in points], [100 * p[0] for p in points], "o", color="0.7")
    on_front = sorted(front, key=lambda i: points[i][1])
    axes.plot([100 * points[i][1] for i in on_front], [100 * points[i][0] for i in on_front], "o-", color="C0")
    for i in on_front:
        axes.annotate(points[i][2], (100 * points[i][1], 100 * points[i][0]), fontsize=7)
    if chosen is not None:
        axes.plot([100 * points[chosen][1]], [100 * points[chosen][0]], "*", color="C3", markersize=14)
    axes.axvline(-100 * margin, color="0.8", linewidth=1, linestyle=":")
    axes.set_xlabel("worst change of a control, in points (dotted: margin)")
    axes.set_ylabel("gain on the tuning split, in points")
    figure.savefig(path, dpi=75, metadata={"Software": None})
