"""The search for numbers of experts, against exhaustive search; its log; and the command on the lab model."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from expert_registry.errors import SteerMoEError, UsageError
from lm_eval_tasks.cli.tune import tune as tune_command
from lm_eval_tasks.errors import ComparisonError
from lm_eval_tasks.evaluation import Options, Steering, evaluate, task_manager
from lm_eval_tasks.tuning.log import TuneLog
from lm_eval_tasks.tuning.run import split_documents
from lm_eval_tasks.tuning.search import Setting, Tried, effect, front, levels, recommend, search
from tests.support.canned_lm import CannedLM
from vllm_steermoe_plugin.models.lab_checkpoint import NAME

APP = typer.Typer()
APP.command()(tune_command)
MARGIN = 0.03


def made_up(setting: Setting) -> Tried:
    """More experts gain more, up to 6 and 20; from 8 activated on the control suffers."""
    gain = 0.1 * min(setting.activate, 6) / 6 + 0.2 * min(setting.deactivate, 20) / 20
    gain += 0.05 if setting.phase == "generation" else 0.0
    return Tried(setting, gain, -0.01 * max(0, setting.activate - 7) - 0.001 * max(0, setting.deactivate - 40))


def test_levels() -> None:
    assert levels(0) == [0] and levels(1) == [0, 1] and levels(6) == [0, 1, 2, 4, 6] and levels(8) == [0, 1, 2, 4, 8]


def test_the_search_comes_near_the_best_of_all() -> None:
    tried = search(made_up, (16, 64), ("both",), MARGIN, 60)
    every = [made_up(Setting(a, d)) for a in range(17) for d in range(65) if a + d]
    best = max(one.gain for one in every if one.control >= -MARGIN)
    found = recommend(tried, MARGIN)
    assert found is not None and found.control >= -MARGIN and found.gain >= best - 0.02
    assert len(tried) <= 60 and len({one.setting for one in tried}) == len(tried)
    assert all(one.setting.size for one in tried)


def test_the_search_tries_the_other_phases_around_the_best() -> None:
    found = recommend(search(made_up, (16, 64), ("both", "generation"), MARGIN, 60), MARGIN)
    assert found is not None and found.setting.phase == "generation"


def test_the_budget_is_kept_and_nothing_to_search_is_an_error() -> None:
    assert len(search(made_up, (16, 64), ("both",), MARGIN, 5)) == 5
    assert [one.setting for one in search(made_up, (1, 0), ("both",), MARGIN, 50)] == [Setting(1, 0)]
    with pytest.raises(UsageError, match="nothing to search"):
        search(made_up, (0, 0), ("both",), MARGIN, 5)


def test_the_front_and_the_recommendation() -> None:
    def tried(gain: float, control: float, size: int) -> Tried:
        return Tried(Setting(size, 0), gain, control)

    all_ = [tried(0.3, -0.1, 9), tried(0.2, -0.02, 8), tried(0.195, -0.02, 3), tried(0.1, 0.0, 2), tried(0.05, -0.2, 1)]
    assert front(all_) == [0, 1, 3]
    # The largest gain breaks the control; of two that are as good as equal the smaller is taken.
    assert recommend(all_, MARGIN) is all_[2]
    assert recommend(all_[:1], MARGIN) is None and recommend([tried(0.0, 0.0, 1)], MARGIN) is None
    twins = [tried(0.1, 0.0, 1), tried(0.1, 0.0, 2)]
    assert front(twins) == [0, 1]


def test_effects_have_their_sign_by_the_metric() -> None:
    before, after = {"a": 0.5, "b": 0.5, "c": 0.9, "d": 0.9}, {"a": 0.7, "b": 0.4, "c": 0.8, "d": 0.95}
    found = effect(Setting(1, 2), before, after, ["c", "d"], {"a": True, "b": False, "c": True, "d": True})
    assert found.gain == pytest.approx(0.15) and found.control == pytest.approx(-0.1)
    assert effect(Setting(1, 2), before, after, [], dict.fromkeys(before, True)).control == 0.0


def test_a_log_goes_on_where_it_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = TuneLog.open(path, {"model": "m", "most": (1, 2)})
    log.add(None, {"t": 0.5})
    log.add(Setting(1, 2, "prompt"), {"t": 0.75})
    with path.open("a") as file:
        file.write('{"setting": {"activ')
    torn = path.read_bytes()
    again = TuneLog.open(path, {"model": "m", "most": (1, 2)})
    assert again.means == {None: {"t": 0.5}, Setting(1, 2, "prompt"): {"t": 0.75}}
    again.add(Setting(3, 0), {"t": 1.0})
    assert len(TuneLog.open(path, {"model": "m", "most": (1, 2)}).means) == 3
    assert path.read_bytes().startswith(torn)
    with pytest.raises(ComparisonError, match="of another search"):
        TuneLog.open(path, {"model": "other"})
    path.write_text(path.read_text() + '{"setting": {"wrong": 1}, "means": {}}\n')
    with pytest.raises(ComparisonError, match="damaged"):
        TuneLog.open(path, {"model": "m", "most": (1, 2)})


def test_the_command_refuses_before_the_engine_starts() -> None:
    for arguments, message in [
        (["--behaviour", "digits:reverse"], "name one behaviour"),
        (["--behaviour", "digits", "--phases", "sometimes"], "unknown phase"),
        (["--behaviour", "colour"], "unknown behaviour"),
    ]:
        result = CliRunner().invoke(APP, [NAME, "--tasks", "steermoe_lab_tuning_digits", *arguments])
        assert isinstance(result.exception, SteerMoEError) and message in str(result.exception)


def test_without_test_tasks_the_documents_are_halved_and_each_half_is_run_alone() -> None:
    tasks = ["steermoe_harmless", "steermoe_fluency"]
    tuning, test = split_documents(task_manager(tasks, Options()), tasks)
    for task in tasks:
        assert sorted(tuning[task] + test[task]) == list(range(100)) and len(tuning[task]) == 50
    asked = []
    for half in (tuning, test):
        model = CannedLM(lambda *_: "Use a lever.")
        run = evaluate(model, [Steering("none", "none", "none")], tasks, Options(chat_template=False, samples=half))
        assert {record.examples for record in run.tasks.values()} == {50}
        asked.append(set(run.requests["steermoe_harmless"]))
    assert not asked[0] & asked[1] and len(asked[0] | asked[1]) == 100
