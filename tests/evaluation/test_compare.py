"""Intervals, tests, verdicts, pairing and reports; no model."""

from __future__ import annotations

import itertools
import json
from math import comb
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import typer
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

from expert_registry.errors import SteerMoEError
from lm_eval_tasks import TASKS
from lm_eval_tasks.cli.compare import compare as compare_command
from lm_eval_tasks.compare.comparison import compare
from lm_eval_tasks.compare.intervals import MOST_EXACT, holm, mcnemar, mean_of, rate, unseen
from lm_eval_tasks.compare.lm_eval_files import read_any_run, run_of
from lm_eval_tasks.compare.pairing import merge_runs
from lm_eval_tasks.compare.report import as_html, markdown, write_report
from lm_eval_tasks.compare.run_file import ProfileRecord, Run, TaskRecord, parse_run, write_run
from lm_eval_tasks.errors import ComparisonError
from tests.support.canned_lm import CannedLM
from tests.support.refusals import not_refused

APP = typer.Typer()
APP.command()(compare_command)
N = 200


def outcomes(hits: int, start: int = 0) -> list[float]:
    return [float(start <= i < start + hits) for i in range(N)]


def profile(name: str, task: list[float], control: list[float], kind: str = "steered", of: str | None = None) -> Any:
    return ProfileRecord(
        name=name,
        kind=kind,
        of=of,
        steering={"digest": "d"},
        outcomes={"t": {"m": task, "bad": task}, "c": {"m": control}},
    )


def record(**changes: Any) -> TaskRecord:
    fields = {"version": "1.0", "metrics": {"m": True}, "examples": N, "documents": "d", "prompts": "p"}
    return TaskRecord.model_validate({**fields, **changes})


def a_run(*profiles: Any, **changes: Any) -> Run:
    tasks = {"t": record(metrics={"m": True, "bad": False}), "c": record(control=True)}
    fields = {"created": "now", "model": "m", "tasks": tasks, "profiles": profiles, "settings": {"limit": None}}
    return Run.model_validate({**fields, **changes})


NONE = profile("none", outcomes(100), outcomes(190), "none")
UP = profile("up", outcomes(130), outcomes(190))
DOWN = profile("down", outcomes(70), outcomes(150))


def test_mcnemar_is_the_binomial_tail() -> None:
    for gained, lost in [(0, 0), (1, 0), (3, 9), (7, 7), (12, 2)]:
        before = [0.0] * gained + [1.0] * lost + [1.0] * 5
        after = [1.0] * gained + [0.0] * lost + [1.0] * 5
        n, k = gained + lost, min(gained, lost)
        expected = min(1.0, 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n)
        assert mcnemar(before, after) == pytest.approx(expected)
        assert mcnemar([0.5, 1], [1, 1]) is None


def test_holm_against_its_definition() -> None:
    values = [0.04, 0.01, 0.03, 0.5]
    assert holm(values) == pytest.approx([0.09, 0.04, 0.09, 0.5])
    for order in itertools.permutations(range(4)):
        shuffled = holm([values[i] for i in order])
        assert shuffled == pytest.approx([holm(values)[i] for i in order])
    assert holm([]) == []


def test_other_than_binary_outcomes_have_a_bootstrapped_mean() -> None:
    values = list(np.linspace(0, 1, 51))
    found = mean_of(values)
    assert found.value == pytest.approx(0.5) and 0.4 < found.low < 0.5 < found.high < 0.6
    assert mean_of([0.0, 1.0]) == rate([0.0, 1.0])
    assert found == mean_of(values) != mean_of(values, seed=1)
    same = mean_of([0.25] * 9)
    assert (same.value, same.low, same.high, same.n) == (0.25, 0.25, 0.25, 9)


def test_a_bootstrapped_interval_leans_as_the_changes_do() -> None:
    """Few large gains: what was not drawn lies above, so the interval reaches further up than down."""
    for n in (60, MOST_EXACT + 1):
        found = mean_of([1.0] * (n // 20) + [0.01] * (n - n // 20))
        assert 0.01 < found.low < found.value < found.high < 0.2
    found = mean_of([1.0] * 3 + [0.01] * 57)
    assert found.high - found.value > 1.3 * (found.value - found.low)


def test_what_was_not_seen_is_bounded() -> None:
    assert unseen(100) == pytest.approx(0.0295, abs=1e-3) and unseen(10) > 0.25


def test_verdicts() -> None:
    found = {(c.profile, c.task, c.metric): c for c in compare(a_run(NONE, UP, DOWN)).changes}
    assert found["up", "t", "m"].verdict == "better" and found["up", "t", "bad"].verdict == "worse"
    assert found["down", "t", "m"].verdict == "worse" and found["down", "t", "bad"].verdict == "better"
    assert found["up", "c", "m"].verdict == "held" and found["down", "c", "m"].verdict == "dropped"
    change = found["up", "t", "m"]
    assert change.change.value == pytest.approx(0.15) and change.p == pytest.approx(2 / 2**30)
    assert change.main and not found["up", "t", "bad"].main and found["up", "t", "bad"].adjusted is None
    assert change.adjusted is not None and change.adjusted == pytest.approx(3 * 2 / 2**30)
    comparison = compare(a_run(NONE, UP, DOWN))
    assert comparison.controls_held("up") is True and comparison.controls_held("down") is False


def test_a_control_on_few_examples_is_unclear_though_nothing_moved() -> None:
    tasks = {"c": record(control=True, examples=10)}
    profiles = [ProfileRecord(name=n, kind="steered", outcomes={"c": {"m": [1.0] * 10}}) for n in ("a", "b")]
    (change,) = compare(a_run(*profiles, tasks=tasks)).changes
    assert change.verdict == "unclear"
    moved = [1.0] * (N - 4) + [0.0] * 4
    (change,) = compare(a_run(NONE, profile("x", outcomes(100), moved)), margin=0.2).changes[2:]
    assert change.verdict == "held"


def test_no_change_is_no_change() -> None:
    other = profile("other", outcomes(100, start=2), outcomes(190))
    change = compare(a_run(NONE, other)).changes[0]
    assert change.verdict == "no change shown" and change.change.low < 0 < change.change.high and change.p == 1.0


def test_an_interval_off_zero_is_not_enough() -> None:
    """Four of 200 examples gained and none lost: the bootstrap is sure, the exact test is not."""
    few = profile("few", outcomes(104), outcomes(190))
    change = compare(a_run(NONE, few)).changes[0]
    assert change.change.low > 0 and change.p == pytest.approx(0.125) and change.verdict == "no change shown"


def test_baseline_by_name_and_by_default() -> None:
    assert compare(a_run(UP, NONE)).baseline == "none"
    assert compare(a_run(NONE, UP), "up").changes[0].change.value == pytest.approx(-0.15)
    with pytest.raises(ComparisonError, match="no profile 'x'; it has 'none', 'up'"):
        compare(a_run(NONE, UP), "x")
    with pytest.raises(ComparisonError, match="nothing to compare"):
        compare(a_run(NONE))
    with pytest.raises(ComparisonError, match="margin"):
        compare(a_run(NONE, UP), margin=0.0)


def test_random_experts_are_a_control_of_their_profile() -> None:
    draws = [profile(f"random {i}", outcomes(100 + i), outcomes(190), "random", "up") for i in range(9)]
    comparison = compare(a_run(NONE, UP, *draws))
    assert {change.profile for change in comparison.changes} == {"up"}
    task, control = comparison.random
    assert task.p == pytest.approx(1 / 10) and task.mean.value == pytest.approx(0.02)
    assert task.changes == pytest.approx([i / N for i in range(9)])
    assert control.p == 1.0
    the_other_way = profile("random", outcomes(0), outcomes(190), "random", "up")
    assert compare(a_run(NONE, UP, the_other_way)).random[0].p == 1.0


def test_runs_that_do_not_pair_are_refused() -> None:
    def tasks(**changes: str) -> dict[str, Any]:
        return {"tasks": {"t": record(metrics={"m": True, "bad": False}, **changes), "c": record(control=True)}}

    rows = [
        ({"model": "other"}, "model: 'm' and 'other'"),
        ({"revision": "r"}, "weights"),
        ({"settings": {"limit": 5}}, "'limit': None and 5"),
        ({"versions": {"vllm": "1"}}, "version of vllm: None and '1' .*--other-versions"),
        (tasks(version="2"), "t: version"),
        (tasks(documents="x"), "t: doc"),
        (tasks(prompts="x"), "t: prompts"),
        ({"judges": {"safe": {"judge": "j"}}}, "judge of safe"),
    ]
    refused = [(changes, ComparisonError, f"do not pair: .*{words}") for changes, words in rows]
    assert not_refused(lambda changes: merge_runs([a_run(NONE), a_run(UP, **changes)]), refused) == []


def test_other_tasks_are_refused_unless_left_out() -> None:
    less = a_run(
        ProfileRecord(name="up", kind="steered", outcomes={"c": {"m": outcomes(190)}}),
        tasks={"c": record(control=True)},
    )
    with pytest.raises(ComparisonError, match="only one of them has t"):
        merge_runs([a_run(NONE), less])
    merged = merge_runs([a_run(NONE), less], ["c"])
    assert set(merged.tasks) == {"c"} and [p.name for p in merged.profiles] == ["none", "up"]
    with pytest.raises(ComparisonError, match="no task x in a run"):
        merge_runs([a_run(NONE)], ["x"])


def test_equal_names_are_told_apart_unless_they_are_the_same() -> None:
    again = profile("none", outcomes(101), outcomes(190), "none")
    assert [p.name for p in merge_runs([a_run(NONE, UP), a_run(NONE, DOWN)]).profiles] == ["none", "up", "down"]
    assert [p.name for p in merge_runs([a_run(NONE), a_run(again)]).profiles] == ["none", "none (run 2)"]
    assert merge_runs([a_run(NONE), a_run(UP, versions={"vllm": "1"})], other_versions=True)


def test_a_run_survives_its_file(tmp_path: Path) -> None:
    run = a_run(NONE, UP)
    write_run(run, tmp_path / "sub" / "run.json")
    assert read_any_run(tmp_path / "sub" / "run.json") == run
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["run.json"]


def test_a_damaged_run_is_refused() -> None:
    def parse(change: Any) -> None:
        value = a_run(NONE, UP).model_dump(mode="json")
        change(value)
        parse_run(value, "x.json")

    rows: list[tuple[Any, str]] = [
        (lambda v: v.update(format_version=2), "format_version"),
        (lambda v: v.update(extra=1), "extra"),
        (lambda v: v["profiles"].append(v["profiles"][0]), "different names"),
        (lambda v: v["profiles"][0]["outcomes"]["t"]["m"].pop(), "199"),
        (lambda v: v["profiles"][0]["outcomes"]["t"]["m"].__setitem__(0, "x"), "number"),
        (lambda v: v["profiles"][0]["outcomes"]["t"]["m"].__setitem__(0, float("nan")), "finite"),
        (lambda v: v["profiles"][0]["outcomes"].pop("t"), "has not the tasks"),
        (lambda v: v["profiles"][0]["outcomes"]["t"].pop("m"), "has not the metrics"),
        (lambda v: v.update(profiles=[]), "profiles must be there"),
    ]
    assert not_refused(parse, rows, ComparisonError) == []


def test_a_file_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for content, message in [("[", "not JSON"), ("[]", "neither"), ("{}", "neither")]:
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ComparisonError, match=message):
            read_any_run(tmp_path / "x.json")


def test_reports_hold_the_numbers_and_no_foreign_markup(tmp_path: Path) -> None:
    evil = profile("<script>|x$y$`", outcomes(130), outcomes(190))
    comparison = compare(a_run(NONE, evil))
    paths = write_report(comparison, tmp_path)
    assert {path.name for path in paths} == {"report.md", "report.html", "comparison.json", "changes.png"}
    for text in (markdown(comparison), as_html(comparison)):
        assert "<script>" not in text and "+15.0 [+10.5, +20.5]" in text and "held" in text
    assert "\\|x" in markdown(comparison)
    assert (tmp_path / "changes.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "comparison.json").read_text())["changes"][0]["verdict"] == "better"
    rows = [line for line in markdown(comparison).splitlines() if line.startswith("| t |")]
    assert rows and all(line.replace("\\|", "").count("|") == 11 for line in rows)


def test_the_command_compares_two_files(tmp_path: Path) -> None:
    write_run(a_run(NONE), tmp_path / "a.json")
    write_run(a_run(UP), tmp_path / "b.json")
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    found = json.loads(CliRunner().invoke(APP, [*files, "--json", "--task", "t"]).stdout)
    assert [change["verdict"] for change in found["changes"]] == ["better", "worse"]
    shown = CliRunner().invoke(APP, [*files, "--out", str(tmp_path / "report"), "--no-plot"])
    assert shown.exit_code == 0 and "held" in shown.stdout and not (tmp_path / "report" / "changes.png").exists()
    write_run(a_run(UP, model="other"), tmp_path / "b.json")
    result = CliRunner().invoke(APP, files)
    assert isinstance(result.exception, SteerMoEError)


def evaluated(model: CannedLM, tasks: list[str]) -> Any:
    manager = TaskManager(include_path=TASKS, include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, limit=6, bootstrap_iters=0, verbosity="ERROR"
    )


def test_results_of_lm_eval_are_runs_in_memory_and_as_files(tmp_path: Path) -> None:
    tasks = ["steermoe_harmless", "steermoe_fluency"]
    model = CannedLM(lambda steering, prompt: "I can't." if steering != "none" and "kill" in prompt else "Use a lever.")
    runs = []
    for steer in ("none", "x"):
        model.use_steering(steer)
        results = evaluated(model, tasks)
        runs.append(run_of(results))
        folder = tmp_path / steer
        folder.mkdir()
        for task, samples in results.pop("samples").items():
            lines = "".join(json.dumps(sample, default=str) + "\n" for sample in samples[::-1])
            (folder / f"samples_{task}_1.jsonl").write_text(lines)
        (folder / "results_1.json").write_text(json.dumps(results, default=str))
        assert read_any_run(folder / "results_1.json").profiles == runs[-1].profiles
    merged = merge_runs(runs)
    assert [(p.name, p.kind) for p in merged.profiles] == [("none", "none"), ("x", "steered")]
    assert (
        merged.tasks["steermoe_harmless"].control and merged.profiles[1].responses["steermoe_harmless"][0] == "I can't."
    )
    (change,) = [c for c in compare(merged).changes if c.task == "steermoe_harmless"]
    assert change.change.value == pytest.approx(-2 / 6) and change.control
    (tmp_path / "x" / "samples_steermoe_fluency_1.jsonl").unlink()
    with pytest.raises(ComparisonError, match="needs --log_samples"):
        read_any_run(tmp_path / "x" / "results_1.json")
