"""The study's results as Markdown."""

from __future__ import annotations

from typing import Any


def markdown(value: dict[str, Any]) -> str:
    """The README of the results folder."""
    lines = [
        "# The lab model, over detection seeds, by activation and by deactivation",
        "",
        "Made by `make study` on the test splits, through vLLM and lm-eval. Changes are in points against unsteered,",
        "paired by example, with 95 % intervals (bootstrap by example). Random: as many experts drawn uniformly;",
        "mean absolute change over the draws, and the draws themselves.",
        "",
    ]
    for behaviour, one in value["behaviours"].items():
        lines += [
            f"## {behaviour}",
            "",
            f"Unsteered {_percent(one['unsteered'])} (n = {one['unsteered']['n']}), control "
            f"{_percent(one['control_unsteered'])} (n = {one['control_unsteered']['n']}). "
            f"Planted experts found, as a share: {_detector(one['detector'])}.",
            "",
            "| mode | experts (+/-) | seed | steered | reversed | control steered | control reversed |",
            "|---|---|---|---|---|---|---|",
        ]
        for mode, found in one["modes"].items():
            by_seed: dict[int, dict[str, Any]] = {}
            for cell in found["cells"]:
                by_seed.setdefault(cell["seed"], {})[cell["direction"]] = cell
            for seed, cells in by_seed.items():
                steered, reverse = cells["steered"], cells["reversed"]
                lines.append(
                    f"| {mode} | {found['activate']}/{found['deactivate']} | {seed} | {_points(steered['change'])} | "
                    f"{_points(reverse['change'])} | {_points(steered['control_change'])} | "
                    f"{_points(reverse['control_change'])} |"
                )
        lines += ["", "| mode | random: mean absolute change | draws | control draws |", "|---|---|---|---|"]
        for mode, found in one["modes"].items():
            mean = found["random_mean_absolute"]
            lines.append(
                f"| {mode} | {100 * mean['value']:.1f} [{100 * mean['low']:.1f}, {100 * mean['high']:.1f}] | "
                f"{_draws(found['random_changes'])} | {_draws(found['random_control_changes'])} |"
            )
        lines.append("")
    versions = ", ".join(f"{name} {version}" for name, version in value["versions"].items())
    return "\n".join([*lines, f"Model {value['model']}; {versions}.", ""])


def _percent(interval: dict[str, float]) -> str:
    return f"{100 * interval['value']:.1f} % [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _points(interval: dict[str, float]) -> str:
    return f"{100 * interval['value']:+.1f} [{100 * interval['low']:+.1f}, {100 * interval['high']:+.1f}]"


def _draws(changes: list[float]) -> str:
    return " ".join(f"{100 * change:+.0f}" for change in changes)


def _detector(shares: dict[str, dict[str, float]]) -> str:
    return "; ".join(
        f"seed {seed}: {', '.join(f'{side} {x:.0%}' for side, x in s.items())}" for seed, s in shares.items()
    )
