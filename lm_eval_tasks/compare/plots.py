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
    points: Sequence[tuple[float, float, float | None, str]],
    front: Sequence[int],
    chosen: int | None,
    limits: tuple[float, float | None],
    path: Path,
) -> None:
    """Gain against the worst change of a control, and against the divergence where it is known.

    Args:
        points: gain, worst control change, mean KL divergence, label; of each setting that a search tried.
        front: indices that no other point beats in all of them.
        chosen: index of the recommended one.
        limits: what a control may lose, and the largest divergence.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    margin, max_kl = limits
    panels: list[tuple[str, list[float], float | None]] = [
        ("worst change of a control, in points", [100 * p[1] for p in points], -100 * margin)
    ]
    if all(p[2] is not None for p in points):
        panels.append(("KL divergence from the unsteered model, in nats", [p[2] or 0.0 for p in points], max_kl))
    gains = [100 * p[0] for p in points]
    figure = Figure(figsize=(7 * len(panels), 5), layout="constrained")
    for axes, (name, costs, limit) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.plot(costs, gains, "o", color="0.7")
        axes.plot([costs[i] for i in front], [gains[i] for i in front], "o", color="C0")
        for i in front:
            axes.annotate(points[i][3], (costs[i], gains[i]), fontsize=7)
        if chosen is not None:
            axes.plot([costs[chosen]], [gains[chosen]], "*", color="C3", markersize=14)
        if limit is not None:
            axes.axvline(limit, color="0.8", linewidth=1, linestyle=":")
        axes.set_xlabel(f"{name} (dotted: limit)")
        axes.set_ylabel("gain on the tuning split, in points")
    figure.savefig(path, dpi=75, metadata={"Software": None})
