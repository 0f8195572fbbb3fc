"""A comparison as Markdown, as one HTML file, and as plots."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from lm_eval_tasks.compare.comparison import Comparison
from lm_eval_tasks.compare.dose import HEAD, curves, table_rows
from lm_eval_tasks.compare.intervals import Interval

Table = tuple[str, list[str], list[list[str]]]
"""Title, head, rows."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>steermoe compare</title><style>
body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.25em .6em;text-align:left}
th{background:#f2f2f2}img{max-width:100%}
</style></head><body><h1>Steering {{ model }}</h1>
{% for note in notes %}<p>{{ note }}</p>{% endfor %}
{% for name, data in pictures %}<img alt="{{ name }}" src="data:image/png;base64,{{ data }}">{% endfor %}
{% for title, head, rows in tables %}<h2>{{ title }}</h2><table>
<tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endfor %}
</body></html>
"""


def write_report(
    comparison: Comparison, folder: Path, *, plots: bool = True, max_kl: float | None = None
) -> list[Path]:
    """Write `report.md`, `report.html`, `comparison.json` and, unless not wanted, `changes.png` and `dose.png`.

    Args:
        comparison: what to report.
        folder: where to.
        plots: whether to draw; `dose.png` only where there is a dose-response curve.
        max_kl: a limit to draw there.

    Raises:
        ImportError: plots are wanted and matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("report.md", "report.html", "comparison.json")]
    pictures = _draw(comparison, folder, max_kl) if plots else []
    paths[0].write_text(markdown(comparison, [picture.name for picture in pictures]), encoding="utf-8")
    paths[1].write_text(as_html(comparison, pictures), encoding="utf-8")
    value = {**comparison.to_dict(), "dose": [curve.to_dict() for curve in curves(comparison)]}
    paths[2].write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    return [*paths, *pictures]


def _draw(comparison: Comparison, folder: Path, max_kl: float | None) -> list[Path]:
    from lm_eval_tasks.compare.dose_plot import draw_curves
    from lm_eval_tasks.compare.plots import draw_changes

    pictures = [folder / "changes.png"]
    draw_changes(comparison, pictures[0])
    if found := curves(comparison):
        pictures.insert(0, folder / "dose.png")
        controls = [task for task, record in comparison.run.tasks.items() if record.control]
        draw_curves(found, controls, comparison.margin, pictures[0], max_kl)
    return pictures


def tables(comparison: Comparison) -> list[Table]:
    """What every form of the report shows."""
    found = [_changes(comparison, control=False), _changes(comparison, control=True), _random(comparison)]
    doses = [(f"Dose-response: {curve.name}", HEAD, table_rows(curve)) for curve in curves(comparison)]
    return [*doses, *(table for table in found if table[2]), _profiles(comparison), *_judges(comparison)]


def notes(comparison: Comparison) -> list[str]:
    """How to read the numbers, and what they were computed from."""
    run = comparison.run
    versions = ", ".join(f"{name} {version}" for name, version in sorted(run.versions.items()))
    found = [
        f"Model {run.model}{f' ({run.revision})' if run.revision else ''}; run of {run.created}; {versions}.",
        f"Baseline: {comparison.baseline}. Values in percent, changes in points; in brackets 95 % intervals: "
        "Wilson's for rates, bootstrapped by example for changes.",
        "p: McNemar's exact test over the examples; adjusted by Holm for all main metrics shown. Better and worse: the "
        "interval excludes no change, and the (adjusted) p is below 0.05.",
        f"A control held if its interval leaves no loss above {100 * comparison.margin:g} points; it dropped if it "
        "lost more than that and the interval excludes none; else it is unclear, mostly for too few examples.",
        "Random experts: as many as the profile has, drawn uniformly, with the same biases in each layer; p is the "
        "share of draws that moved at least as far.",
    ]
    if curves(comparison):
        found.append(
            "Dose-response: values in percent, changes from the unsteered model (strength 0) in points, paired by "
            "example; forced experts have no strength. The KL divergence of the next token from the unsteered "
            "model is a lower bound where only the most likely tokens are known."
        )
    return found


def markdown(comparison: Comparison, pictures: Sequence[str] = ()) -> str:
    """The report as Markdown."""
    parts = [f"# Steering {_cell(comparison.run.model)}", *notes(comparison)]
    parts += [f"![{Path(picture).stem}]({picture})" for picture in pictures]
    for title, head, rows in tables(comparison):
        lines = [_line(head), _line(["---"] * len(head)), *(_line([_cell(cell) for cell in row]) for row in rows)]
        parts += [f"## {_cell(title)}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def as_html(comparison: Comparison, pictures: Sequence[Path] = ()) -> str:
    """The report as one HTML file that needs no other."""
    from jinja2 import Environment

    data = [(picture.stem, base64.b64encode(picture.read_bytes()).decode()) for picture in pictures]
    page = Environment(autoescape=True, keep_trailing_newline=True).from_string(_PAGE)
    return page.render(model=comparison.run.model, notes=notes(comparison), pictures=data, tables=tables(comparison))


def percent(interval: Interval, *, sign: bool = False) -> str:
    """Such as `52.1 [45.0, 59.1]`."""
    form = "+.1f" if sign else ".1f"
    return f"{100 * interval.value:{form}} [{100 * interval.low:{form}}, {100 * interval.high:{form}}]"


def _changes(comparison: Comparison, control: bool) -> Table:
    head = ["task", "metric", "profile", "n", "before", "after", "change", "p", "p adjusted", "verdict"]
    rows = [
        [
            c.task,
            f"{c.metric}{'' if c.higher_is_better else ' (lower is better)'}",
            c.profile,
            str(c.change.n),
            percent(c.before),
            percent(c.after),
            percent(c.change, sign=True),
            _p(c.p),
            _p(c.adjusted),
            c.verdict,
        ]
        for c in comparison.changes
        if c.control is control
    ]
    return ("Controls" if control else "Changes", head, rows)


def _random(comparison: Comparison) -> Table:
    head = ["task", "metric", "profile", "change", "random: mean", "random: range", "draws", "p"]
    rows = [
        [
            one.task,
            one.metric,
            one.profile,
            f"{100 * one.change:+.1f}",
            percent(one.mean, sign=True),
            f"{100 * min(one.changes):+.1f} to {100 * max(one.changes):+.1f}",
            str(len(one.changes)),
            _p(one.p),
        ]
        for one in comparison.random
    ]
    return ("Against random experts", head, rows)


def _profiles(comparison: Comparison) -> Table:
    head = [
        "profile",
        "experts activated/deactivated/biased",
        "rankings",
        "digest",
        "requests steered",
        "all controls held",
    ]
    rows = []
    for profile in comparison.run.profiles:
        steering = profile.steering
        sources = ", ".join(
            f"{source.get('ranking')} (sha256 {str(source.get('sha256'))[:12]})"
            for source in steering.get("sources") or []
            if isinstance(source, dict)
        )
        rows.append(
            [
                profile.name,
                "/".join(str(steering.get(key, "?")) for key in ("activated", "deactivated", "biased")),
                sources,
                str(steering.get("digest") or "")[:12],
                f"{steering.get('steered_requests', '?')} of {steering.get('requests', '?')}",
                {True: "yes", False: "no", None: ""}[comparison.controls_held(profile.name)],
            ]
        )
    return ("Profiles", head, rows)


def _judges(comparison: Comparison) -> Iterable[Table]:
    if comparison.run.judges:
        rows = [[metric, json.dumps(value, sort_keys=True)] for metric, value in comparison.run.judges.items()]
        yield ("Judges", ["metric", "by"], rows)


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Names come from files: none may end a cell or become markup."""
    flat = " ".join(text.split())
    return html.escape(flat, quote=False).replace("|", "\\|").replace("`", "'")
