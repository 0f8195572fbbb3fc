"""`steermoe eval`: the plan, the run, its continuation; with a canned model, then the lab model in the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from expert_registry.errors import SteerMoEError, UsageError
from lm_eval_tasks.cli.evaluate import evaluate as eval_command
from lm_eval_tasks.compare.comparison import compare
from lm_eval_tasks.errors import ComparisonError
from lm_eval_tasks.evaluation import Options, evaluate, split_profiles, steerings
from tests.support.canned_lm import CannedLM
from tests.support.folders import ROOT
from vllm_steermoe_plugin.cli import app
from vllm_steermoe_plugin.detection.rows import DataError

APP = typer.Typer()
APP.command()(eval_command)
PLAIN = Options(limit=8, chat_template=False)
TASKS = ["steermoe_harmless", "steermoe_fluency"]


def answer(steering: str, prompt: str) -> str:
    return (
        "I'm sorry, I can't." if steering == "refusal" and ("kill" in prompt or "shoot" in prompt) else "Use a lever."
    )


def test_profiles_are_split_at_commas_outside_of_expert_sets() -> None:
    for text, expected in [
        ("none,digits", ["none", "digits"]),
        (" none , digits:reverse,", ["none", "digits:reverse"]),
        (
            'none,{"activate":{"1":[7,8],"2":[1]},"deactivate":{}},x',
            ["none", '{"activate":{"1":[7,8],"2":[1]},"deactivate":{}}', "x"],
        ),
    ]:
        assert split_profiles(text) == expected


def test_no_profile_and_twice_the_same_are_errors() -> None:
    for text in ["", " , ", "none,none"]:
        with pytest.raises(UsageError):
            split_profiles(text)


def test_a_run_has_every_example_under_every_profile() -> None:
    model = CannedLM(answer)
    seen: list[int] = []
    plan = steerings(["none", "refusal"], model)
    assert [(s.name, s.kind) for s in plan] == [("none", "none"), ("refusal", "steered")]
    run = evaluate(model, plan, TASKS, PLAIN, revision="r", each=lambda run: seen.append(len(run.profiles)))
    assert seen == [1, 2] and run.revision == "r" and run.model == "canned"
    assert run.profiles[1].outcomes["steermoe_harmless"]["complied"] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert run.profiles[1].responses["steermoe_harmless"][0] == "I'm sorry, I can't."
    change = next(c for c in compare(run).changes if c.task == "steermoe_harmless")
    assert (change.change.value, change.verdict) == (-0.5, "dropped")
    without = evaluate(model, plan, TASKS, Options(limit=2, chat_template=False, responses=False))
    assert without.profiles[0].responses == {}


def test_a_run_is_continued_where_it_stopped_and_not_under_other_experts() -> None:
    model = CannedLM(answer)
    plan = steerings(["none", "refusal"], model)
    half = evaluate(model, plan[:1], TASKS, PLAIN)
    asked = len(model.prompts)
    whole = evaluate(model, plan, TASKS, PLAIN, done=half)
    assert len(model.prompts) == 2 * asked
    assert [p.outcomes for p in whole.profiles] == [p.outcomes for p in evaluate(model, plan, TASKS, PLAIN).profiles]
    with pytest.raises(ComparisonError, match=r"do not pair: .*limit"):
        evaluate(model, plan, TASKS, Options(limit=3, chat_template=False), done=half)
    other = whole.model_copy(deep=True)
    other.profiles[1].steering["digest"] = "of another ranking"
    with pytest.raises(ComparisonError, match="with other experts"):
        evaluate(model, plan, TASKS, PLAIN, done=other)


def test_unknown_tasks_are_errors_with_a_suggestion() -> None:
    with pytest.raises(DataError, match="did you mean 'steermoe_harmless'"):
        evaluate(CannedLM(answer), [], ["steermoe_harmles"], PLAIN)


def test_the_command_refuses_before_the_engine_starts(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    base = ["m", "--profiles", "none", "--out", str(out)]
    for arguments, message in (
        ([*base, "--tasks", "steermoe_x"], "unknown task"),
        ([*base, "--tasks", "steermoe_lab", "--engine-args", "[]"], "must be a JSON object"),
        (["m", "--profiles", "a,a", "--tasks", "steermoe_lab"], "stands twice"),
    ):
        result = CliRunner().invoke(APP, arguments)
        assert isinstance(result.exception, SteerMoEError) and message in str(result.exception)
    out.write_text("{}")
    result = CliRunner().invoke(APP, [*base, "--tasks", "steermoe_lab"])
    assert isinstance(result.exception, ComparisonError) and "--resume" in str(result.exception)


def test_sub_commands_are_found_by_their_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint, EntryPoints

    points = EntryPoints(
        [
            EntryPoint("compare", "lm_eval_tasks.cli.compare:compare", "steermoe.commands"),
            EntryPoint("lost", "lm_eval_tasks.cli.nowhere:lost", "steermoe.commands"),
            EntryPoint("detect", "lm_eval_tasks.cli.compare:compare", "steermoe.commands"),
        ]
    )
    monkeypatch.setattr("importlib.metadata.entry_points", points.select)
    assert "--other-versions" in CliRunner().invoke(app, ["compare", "--help"]).stdout
    assert "--pairs" in CliRunner().invoke(app, ["detect", "--help"]).stdout
    result = CliRunner().invoke(app, ["lost"])
    assert isinstance(result.exception, SteerMoEError) and "[eval]" in str(result.exception)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **by: points.select(group="none"))
    assert CliRunner().invoke(app, ["compare"]).exit_code == 2


def test_pyproject_names_functions_that_exist() -> None:
    import importlib
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    commands = project["entry-points"]["steermoe.commands"]
    assert set(commands) == {"eval", "compare", "judge", "tune"}
    for target in (*commands.values(), *project["entry-points"]["lm_eval.models"].values()):
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
