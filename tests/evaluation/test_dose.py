"""Dose-response curves: which profiles are on one, what it says of them, and the report that shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lm_eval_tasks.compare.comparison import compare
from lm_eval_tasks.compare.dose import DIVERGENCE, curves, table_rows
from lm_eval_tasks.compare.report import write_report
from lm_eval_tasks.compare.run_file import ProfileRecord, Run, TaskRecord

N = 40


def a_profile(request: str, hits: int, kind: str = "steered", **fields: Any) -> ProfileRecord:
    steering = {"request": request, **fields.pop("steering", {})}
    ones = [float(i < hits) for i in range(N)]
    outcomes = {"t": {"m": ones}, "c": {"m": [1.0] * N}}
    return ProfileRecord(**{"name": request, "kind": kind, "steering": steering, "outcomes": outcomes, **fields})


def a_run(*profiles: ProfileRecord) -> Run:
    record = {"version": "1", "metrics": {"m": True}, "examples": N, "documents": "d", "prompts": "p"}
    tasks = {"t": TaskRecord.model_validate(record), "c": TaskRecord.model_validate({**record, "control": True})}
    return Run(created="now", model="m", tasks=tasks, profiles=list(profiles))


NONE = a_profile("none", 10, "none")
DRAWS = [a_profile(f"{{{i}}}", 10 + i, "random", of="digits:strength=2", divergence=[0.01 * i, 0.0]) for i in range(3)]
RUN = a_run(
    NONE,
    a_profile("digits", 34),
    a_profile("digits:strength=2", 30, divergence=[0.1, 0.3]),
    a_profile("digits:strength=-1", 2),
    a_profile("digits:strength=0.5", 20, divergence=[0.0, 0.1]),
    a_profile("digits:reverse", 0),
    *DRAWS,
)


def test_a_curve_goes_from_the_reverse_through_none_to_forced_experts() -> None:
    (curve,) = curves(compare(RUN))
    assert curve.name == "digits"
    assert [dose.label for dose in curve.doses] == ["forced, reverse", "-1", "0", "0.5", "2", "forced"]
    values = [one.value * N for dose in curve.doses for one in dose.responses if one.task == "t"]
    assert values == pytest.approx([0, 2, 10, 20, 30, 34])
    strong = {one.task: one for one in curve.doses[4].responses}
    assert strong["t"].change.value == pytest.approx(0.5) and strong["t"].change.low < 0.5 < strong["t"].change.high
    assert strong["t"].random == pytest.approx([0, 1 / N, 2 / N])
    assert strong[DIVERGENCE].value == pytest.approx(0.2) and strong[DIVERGENCE].random == pytest.approx(
        [0, 0.005, 0.01]
    )
    rows = table_rows(curve)
    assert len(rows) == 2 * 6 + 3 and rows[0][:3] == ["t", "forced, reverse", "0.0"]
    assert [row[-1] for row in rows if row[0] == "t"] == ["0", "0", "0", "0", "3", "0"]
    assert next(row for row in rows if row[:2] == ["t", "2"])[4].startswith("+2.5 [")
    assert next(row for row in rows if row[:2] == [DIVERGENCE, "2"])[2] == "0.2000"


def test_other_experts_weights_phases_and_behaviours_have_curves_of_their_own() -> None:
    texts = [f"{head}:strength={x}{tail}" for x in (0.5, 1) for head, tail in (
        ("digits", ""), ("digits", ":top=20"), ("digits", ":by=sign"), ("digits:phase=prompt", ""), ("refusal", ""),
    )]  # fmt: skip
    lone = ["tone:strength=1", "a:strength=1+b", "digits:activate=3", "[not, a, request]", '{"activate": {"1": [2]}}']
    found = curves(compare(a_run(NONE, *(a_profile(text, 12) for text in (*texts, *lone)))))
    assert [curve.name for curve in found] == [
        "digits",
        "digits:top=20",
        "digits:by=sign",
        "digits:phase=prompt",
        "refusal",
    ]
    assert all([dose.label for dose in curve.doses] == ["0", "0.5", "1"] for curve in found)
    assert curves(compare(a_run(NONE, a_profile("digits", 12)))) == []


def test_a_recommended_strength_is_on_the_curve_and_not_forced() -> None:
    source = {"sources": [{"strength": 0.8, "top": 20, "by": None}]}
    run = a_run(NONE, a_profile("digits", 20, steering=source), a_profile("digits:strength=2:top=20", 30))
    (curve,) = curves(compare(run))
    assert curve.name == "digits:top=20" and [dose.label for dose in curve.doses] == ["0", "0.8", "2"]


def test_the_report_draws_and_tabulates_curves(tmp_path: Path) -> None:
    paths = write_report(compare(RUN), tmp_path, max_kl=0.05)
    assert (tmp_path / "dose.png").read_bytes().startswith(b"\x89PNG") and tmp_path / "dose.png" in paths
    text = (tmp_path / "report.md").read_text()
    assert "![dose](dose.png)" in text and "## Dose-response: digits" in text and "| t | -1 | 5.0 |" in text
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 2
    (curve,) = json.loads((tmp_path / "comparison.json").read_text())["dose"]
    assert [dose["strength"] for dose in curve["doses"]] == [None, -1, 0, 0.5, 2, None]
    several = a_run(*RUN.profiles, *(a_profile(f"$x$:strength={x}".replace("$", ""), 9) for x in (1, 2)))
    assert write_report(compare(several), tmp_path / "two") and len(curves(compare(several))) == 2
