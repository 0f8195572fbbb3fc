"""`steermoe eval` and `steermoe tune` on the lab model in one real engine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from expert_registry import Registry
from lm_eval_tasks.cli.evaluate import evaluate as eval_command
from lm_eval_tasks.cli.tune import tune as tune_command
from lm_eval_tasks.compare.comparison import compare
from lm_eval_tasks.compare.lm_eval_files import read_any_run
from lm_eval_tasks.compare.run_file import Run, write_run
from lm_eval_tasks.evaluation import evaluate, steerings
from tests.support.planted import VERSION, planted_registry
from vllm_steermoe_plugin.models.lab_checkpoint import NAME
from vllm_steermoe_plugin.steering.profile import SteeringProfile

APP = typer.Typer()
APP.command()(tune_command)
EVAL = typer.Typer()
EVAL.command()(eval_command)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, kept_alive: list[Any]) -> Iterator[Any]:
    """The lab model in its engine, with perfect rankings."""
    from lm_eval_tasks.models.in_process import SteerMoEVLLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEERMOE_REGISTRY", str(planted_registry(tmp_path_factory.mktemp("registry"))))
        kept_alive.append(SteerMoEVLLM(pretrained=NAME))
        yield kept_alive[-1]


def test_the_lab_model_steered_reversed_and_random(lab: Any, tmp_path: Path) -> None:
    plan = steerings(["none", "digits", "digits:reverse", "digits:phase=prompt"], lab, draws=2)
    random = [s for s in plan if s.kind == "random"]
    assert len(random) == 6 and len({s.text for s in random[:2]}) == 2
    assert {SteeringProfile.from_json(s.text).phase for s in random if s.of == "digits:phase=prompt"} == {"prompt"}
    assert all(len(SteeringProfile.from_json(s.text).activate) == 6 for s in random)
    tasks = ["steermoe_lab_digits", "steermoe_lab_digits_control"]
    run = evaluate(lab, [s for s in plan if "phase" not in s.name], tasks)
    write_run(run, tmp_path / "run.json")
    assert read_any_run(tmp_path / "run.json") == Run.model_validate(json.loads(run.model_dump_json()))
    assert all(p.steering["requests"] == p.steering["steered_requests"] > 0 for p in run.profiles[1:])
    comparison = compare(run)
    verdicts = {(c.profile, c.task.removeprefix("steermoe_lab_")): c.verdict for c in comparison.changes}
    assert verdicts == {
        ("digits", "digits"): "better",
        ("digits", "digits_control"): "held",
        ("digits:reverse", "digits"): "worse",
        ("digits:reverse", "digits_control"): "held",
    }
    for one in comparison.random:
        if one.task == "steermoe_lab_digits":
            assert abs(one.change) > 0.3 and abs(one.mean.value) < 0.2 and one.p == pytest.approx(1 / 3)


def test_the_lab_model_is_tuned_judged_published_and_continued(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval_tasks.models.in_process.SteerMoEVLLM", lambda **_: lab)
    arguments = [
        NAME,
        *("--behaviour", "digits", "--tasks", "steermoe_lab_tuning_digits"),
        *("--controls", "steermoe_lab_tuning_digits_control"),
        *("--test-tasks", "steermoe_lab_digits,steermoe_lab_digits_control"),
        *("--most", "8", "8", "--budget", "7", "--out", str(tmp_path / "out"), "--publish"),
    ]
    result = CliRunner().invoke(APP, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    value = json.loads((tmp_path / "out" / "tuned.json").read_text())
    assert len(value["tried"]) == 7 and value["front"]
    chosen = value["recommended"]
    verdicts = {c["task"]: c["verdict"] for c in value["test"]["changes"] if c["profile"] == "tuned"}
    assert verdicts == {"steermoe_lab_digits": "better", "steermoe_lab_digits_control": "held"}
    newest = Registry.default().find([NAME], "digits").ranking.card
    assert newest.version == VERSION + 1
    assert (newest.recommended.activate, newest.recommended.deactivate) == (chosen["activate"], chosen["deactivate"])
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"front.png", "report.md", "test-run.json"}
    # All of it again from the log: the engine is asked for the test only.
    asked: list[Any] = []
    monkeypatch.setattr("lm_eval_tasks.tuning.bench.measure", lambda *args: asked.append(args))
    again = CliRunner().invoke(APP, [*arguments[:-1], "--behaviour", f"digits@{VERSION}"], catch_exceptions=False)
    assert again.exit_code == 0 and not asked
    assert json.loads((tmp_path / "out" / "tuned.json").read_text())["tried"] == value["tried"]


def test_a_strength_is_tuned_within_limits_with_its_curve_and_published(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval_tasks.models.in_process.SteerMoEVLLM", lambda **_: lab)
    out = tmp_path / "out"
    arguments = [
        NAME,
        *("--behaviour", f"digits@{VERSION}", "--tasks", "steermoe_lab_tuning_digits"),
        *("--controls", "steermoe_lab_tuning_digits_control", "--test-tasks", "steermoe_lab_digits"),
        *("--strengths", "0.25,1", "--budget", "4", "--random", "1", "--out", str(out), "--publish", "--no-plot"),
    ]
    result = CliRunner().invoke(APP, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "at most 4 settings; a curve of 2 strengths or more" in result.stderr
    value = json.loads((out / "tuned.json").read_text())
    assert [one["setting"]["strength"] for one in value["tried"][:2]] == [0.25, 1] and len(value["tried"]) == 4
    # A dial: some of the gain at a quarter of the strength, and nothing lost.
    assert 0 < value["tried"][0]["gain"] < 0.5 * value["tried"][1]["gain"]
    assert all(0 < one["kl"] < 0.01 and one["control"] > -0.03 for one in value["tried"])
    chosen = value["recommended"]
    assert chosen["request"] == f"digits@{VERSION}:strength={chosen['strength']:g}"
    (curve,) = json.loads((out / "tuning" / "comparison.json").read_text())["dose"]
    doses = {dose["strength"]: dose["responses"] for dose in curve["doses"]}
    assert {0.25, 1.0, 0.0, None, chosen["strength"]} <= doses.keys()
    assert all(len(one["random"]) == 1 for one in doses[1.0])
    newest = Registry.default().find([NAME], "digits").ranking.card
    assert newest.format_version == 2 and newest.recommended.strength == chosen["strength"]
    lab.use_steering(f"digits@{newest.version}")
    info = lab.get_model_info()["steermoe"]
    assert info["activated"] == 0 < info["biased"]
    assert info["sources"][0]["strength"] == chosen["strength"] and info["digest"] == chosen["digest"]


def test_the_next_tokens_of_many_steerings_come_from_one_batch(lab: Any) -> None:
    lab.use_steering("none")
    prompts = ["<|user|>Start at 3 and count to 6.<|end|><|assistant|>", "<|user|>Say the letters from d to h.<|end|>"]
    texts = ["none", f"digits@{VERSION}:strength=0", f"digits@{VERSION}:strength=1", f"digits@{VERSION}"]
    found = lab.next_tokens(prompts, texts)
    assert [len(each) for each in found] == [2] * 4 and all(len(one) == 20 for each in found for one in each)
    assert found[0] == found[1] != found[2] != found[3]
    assert all(sum(math.exp(value) for value in one.values()) == pytest.approx(1, abs=0.1) for one in found[0])
    assert lab.get_model_info()["steermoe"]["requests"] == 0


def test_biases_at_several_strengths_are_compared_with_controls_of_the_same_norm(lab: Any) -> None:
    texts = [f"digits@{VERSION}", f"digits@{VERSION}:strength=0.3", f"digits@{VERSION}:strength=-1:top=10:phase=prompt"]
    plan = steerings(["none", *texts], lab, draws=2)
    drawn = {s.of: SteeringProfile.from_json(s.text) for s in plan if s.kind == "random"}
    assert len(plan) == 4 + 6 and len(drawn[texts[0]].activate) == 6 and not drawn[texts[0]].bias
    assert not drawn[texts[1]].activate and len(drawn[texts[2]].bias) == 10 and drawn[texts[2]].phase == "prompt"


def test_the_eval_command_writes_run_and_report(lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval_tasks.models.in_process.SteerMoEVLLM", lambda **_: lab)
    out = tmp_path / "run.json"
    arguments = [
        NAME,
        *("--profiles", "none,refusal", "--tasks", "steermoe_lab_refusal", "--limit", "12"),
        *("--out", str(out), "--report", str(tmp_path / "report")),
    ]
    result = CliRunner().invoke(EVAL, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "refusal" in result.stdout
    run = read_any_run(out)
    assert run.revision.startswith("sha256:") and len(run.profiles[1].responses["steermoe_lab_refusal"]) == 12
    assert run.profiles[1].steering["steered_requests"] == 12
    assert (tmp_path / "report" / "report.html").exists()
    more = [argument.replace("none,refusal", "none,refusal,refusal:reverse") for argument in arguments]
    assert CliRunner().invoke(EVAL, [*more, "--resume"], catch_exceptions=False).exit_code == 0
    assert [profile.name for profile in read_any_run(out).profiles] == ["none", "refusal", "refusal:reverse"]
