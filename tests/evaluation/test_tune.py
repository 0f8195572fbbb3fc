"""The search for numbers of experts and strengths, against exhaustive search; its log; and what the command refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from expert_registry import Registry
from expert_registry.errors import SteerMoEError, UsageError
from expert_registry.format import dump_ranking, parse_ranking
from expert_registry.registry import Entry, Found
from lm_eval_tasks.cli.tune import tune as tune_command
from lm_eval_tasks.compare.comparison import compare
from lm_eval_tasks.compare.run_file import ProfileRecord, Run, TaskRecord
from lm_eval_tasks.errors import ComparisonError
from lm_eval_tasks.evaluation import Options, Steering, evaluate, task_manager
from lm_eval_tasks.tuning.bench import Bench
from lm_eval_tasks.tuning.log import TuneLog
from lm_eval_tasks.tuning.publishing import new_version
from lm_eval_tasks.tuning.run import Goal, run_search, split_documents, sweep
from lm_eval_tasks.tuning.search import Limits, Tried, effect, front, recommend, search
from lm_eval_tasks.tuning.settings import Counts, CountSpace, Dial, DialSpace, Setting, Space, levels
from tests.support.canned_lm import CannedLM
from tests.support.planted import VERSION, planted_ranking
from vllm_steermoe_plugin.models.lab_checkpoint import NAME

APP = typer.Typer()
APP.command()(tune_command)
MARGIN = 0.03
LIMITS = Limits(MARGIN)


def made_up(setting: Setting) -> Tried:
    """More experts gain more, up to 6 and 20; from 8 activated on the control suffers. A strength gains up to 0.8."""
    if isinstance(setting, Dial):
        gain = 0.3 * min(setting.strength, 0.8) / 0.8 * min(setting.top or 300, 100) / 100
        return Tried(setting, gain, 0.0, 0.1 * setting.strength * (setting.top or 300) / 300)
    gain = 0.1 * min(setting.activate, 6) / 6 + 0.2 * min(setting.deactivate, 20) / 20
    gain += 0.05 if setting.phase == "generation" else 0.0
    return Tried(setting, gain, -0.01 * max(0, setting.activate - 7) - 0.001 * max(0, setting.deactivate - 40))


def found_in(*spaces: Space, budget: int = 60, limits: Limits = LIMITS) -> list[Tried]:
    return search(lambda settings: [made_up(one) for one in settings], spaces, limits, budget)


COUNTS = CountSpace(16, 64, ("both",))
DIAL = DialSpace((0.25, 0.5, 1.0, 2.0), (50, 200, None), (None,), 300, ("both",))


def test_levels() -> None:
    assert levels(0) == [0] and levels(1) == [0, 1] and levels(6) == [0, 1, 2, 4, 6] and levels(8) == [0, 1, 2, 4, 8]


def test_the_search_comes_near_the_best_of_all() -> None:
    tried = found_in(COUNTS)
    every = [made_up(Counts(a, d)) for a in range(17) for d in range(65) if a + d]
    best = max(one.gain for one in every if LIMITS.held(one))
    found = recommend(tried, LIMITS)
    assert found is not None and LIMITS.held(found) and found.gain >= best - 0.02
    assert len(tried) <= 60 and len({one.setting for one in tried}) == len(tried)
    assert all(one.setting != Counts(0, 0) for one in tried)


def test_a_search_for_strengths_goes_from_small_to_large_then_around_the_best() -> None:
    tried = found_in(DIAL, budget=40)
    grid = [one.setting for one in tried[:12]]
    assert grid == DIAL.grid() and [one.strength for one in grid if isinstance(one, Dial)][::3] == [0.25, 0.5, 1.0, 2.0]
    found = recommend(tried, LIMITS)
    assert found is not None and found.gain > 0.29 and isinstance(found.setting, Dial)
    # As good with half of the divergence as the best of the grid, which is strength 1 for 200 experts.
    assert found.kl is not None and found.kl < 0.04 and 0.7 < found.setting.strength < 0.9
    assert 90 <= (found.setting.top or 300) <= 120
    assert all(float(Dial(x).named("a", None, False).text().partition("=")[2]) == x for x in (0.707, 0.0123, 1.41))


def test_a_limit_on_the_divergence_keeps_the_search_below_it() -> None:
    limits = Limits(MARGIN, 0.02)
    tried = found_in(DIAL, limits=limits)
    found = recommend(tried, limits)
    assert found is not None and found.kl is not None and 0.01 < found.kl <= 0.02 and found.gain > 0.15
    assert recommend(tried, Limits(MARGIN, 1e-9)) is None


def test_one_number_of_experts_is_not_refined_and_strengths_end() -> None:
    tried = found_in(DialSpace((1.0,), (None,), (None,), 300, ("both",)), budget=500)
    strengths = sorted(one.setting.strength for one in tried if isinstance(one.setting, Dial))
    assert {one.setting.top for one in tried if isinstance(one.setting, Dial)} == {None} and len(tried) < 20
    assert strengths[0] < 0.8 and strengths[-1] == 1.0


def test_both_kinds_share_one_search() -> None:
    tried = found_in(COUNTS, DIAL, budget=60)
    assert {type(one.setting) for one in tried[:6]} == {Counts, Dial} and {*DIAL.grid(), *COUNTS.grid()} <= {
        one.setting for one in tried
    }
    assert recommend(tried, LIMITS) is not None
    # As good without a measured divergence: biases before forced experts.
    twins = [Tried(Counts(1, 0), 0.2, 0.0), Tried(Dial(2.0), 0.2, 0.0), Tried(Dial(1.0), 0.2, 0.0)]
    assert recommend(twins, LIMITS) is twins[2]


def test_the_search_tries_the_other_phases_around_the_best() -> None:
    found = recommend(found_in(CountSpace(16, 64, ("both", "generation"))), LIMITS)
    assert found is not None and found.setting.phase == "generation"


def test_the_budget_is_kept_and_nothing_to_search_is_an_error() -> None:
    assert len(found_in(COUNTS, budget=5)) == 5 and len(found_in(DIAL, budget=5)) == 5
    assert [one.setting for one in found_in(CountSpace(1, 0, ("both",)), budget=50)] == [Counts(1, 0)]
    with pytest.raises(UsageError, match="nothing to search"):
        found_in(CountSpace(0, 0, ("both",)), budget=5)


def test_the_front_and_the_recommendation() -> None:
    def tried(gain: float, control: float, size: int, kl: float | None = None) -> Tried:
        return Tried(Counts(size, 0), gain, control, kl)

    all_ = [tried(0.3, -0.1, 9), tried(0.2, -0.02, 8), tried(0.195, -0.02, 3), tried(0.1, 0.0, 2), tried(0.05, -0.2, 1)]
    assert front(all_) == [0, 1, 3]
    # The largest gain breaks the control; of two that are as good as equal the smaller is taken.
    assert recommend(all_, LIMITS) is all_[2]
    assert recommend(all_[:1], LIMITS) is None and recommend([tried(0.0, 0.0, 1)], LIMITS) is None
    twins = [tried(0.1, 0.0, 1), tried(0.1, 0.0, 2)]
    assert front(twins) == [0, 1]
    quiet = [tried(0.1, 0.0, 1, 0.2), tried(0.1, 0.0, 9, 0.1)]
    assert front(quiet) == [1] and recommend(quiet, LIMITS) is quiet[1]


def test_effects_have_their_sign_by_the_metric() -> None:
    before, after = {"a": 0.5, "b": 0.5, "c": 0.9, "d": 0.9}, {"a": 0.7, "b": 0.4, "c": 0.8, "d": 0.95}
    found = effect(Counts(1, 2), before, after, ["c", "d"], {"a": True, "b": False, "c": True, "d": True})
    assert found.gain == pytest.approx(0.15) and found.control == pytest.approx(-0.1)
    assert effect(Counts(1, 2), before, after, [], dict.fromkeys(before, True)).control == 0.0


def a_run(value: float) -> Run:
    record = TaskRecord(version="1", metrics={"m": True}, examples=2, documents="d", prompts="p")
    profile = ProfileRecord(name="x", kind="steered", outcomes={"t": {"m": [value, value]}}, divergence=[0.1])
    return Run(created="now", model="m", tasks={"t": record}, profiles=[profile])


def test_a_log_goes_on_where_it_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = TuneLog.open(path, {"model": "m", "most": (1, 2)})
    log.add((None, None), a_run(0.5))
    log.add((Counts(1, 2, "prompt"), None), a_run(0.75))
    log.add((Dial(0.5, 20, "sign"), 3), a_run(0.25))
    with path.open("a") as file:
        file.write('{"setting": {"activ')
    torn = path.read_bytes()
    again = TuneLog.open(path, {"model": "m", "most": (1, 2)})
    assert again.runs == log.runs and len(log.runs) == 3
    again.add((Counts(3, 0), None), a_run(1.0))
    assert len(TuneLog.open(path, {"model": "m", "most": (1, 2)}).runs) == 4
    assert path.read_bytes().startswith(torn)
    with pytest.raises(ComparisonError, match="of another search"):
        TuneLog.open(path, {"model": "other"})
    path.write_text(path.read_text() + '{"setting": {"wrong": 1}, "means": {}}\n')
    with pytest.raises(ComparisonError, match="damaged"):
        TuneLog.open(path, {"model": "m", "most": (1, 2)})
    path.write_text('{"format": "steermoe-tune", "model": "m", "most": [1, 2]}\n')
    with pytest.raises(ComparisonError, match=r"of another search \(other format_version\)"):
        TuneLog.open(path, {"model": "m", "most": (1, 2)})


def found_ranking(behaviour: str = "digits") -> Found:
    return Found(Entry("steermoe-lab", behaviour, VERSION, Path("x"), Path()), planted_ranking(behaviour), "0" * 64, ())


def a_goal(**changes: Any) -> Goal:
    fields: dict[str, Any] = {"reverse": False, "tasks": ("t",), "controls": ("c",), "spaces": (DIAL,), "budget": 5}
    return Goal(**{"behaviour": "digits", "limits": LIMITS, **fields, **changes})


def test_a_search_measures_in_one_batch_sweeps_the_best_curve_and_goes_on_from_its_log(tmp_path: Path) -> None:
    tasks, controls = ["steermoe_harmless"], ["steermoe_fluency"]
    options = Options(chat_template=False, samples={task: [0, 1, 2, 3] for task in (*tasks, *controls)})
    space = DialSpace((0.5, 1.0), (6, 12), (None,), 36, ("both",))
    goal = a_goal(tasks=tuple(tasks), controls=tuple(controls), spaces=(space,), budget=6, draws=2)
    manager = task_manager([*tasks, *controls], options)

    def bench() -> Bench:
        model = CannedLM(lambda steering, _: "Use it." if "strength=1" in steering else "I can't.")
        return Bench(model, [*tasks, *controls], manager, options, ["a", "b"], TuneLog.open(tmp_path / "log", {}))

    first = bench()
    first.model.shape = planted_ranking("digits").shape
    tried = run_search(first, goal, found_ranking(), lambda _: None)
    assert [one.gain for one in tried[:4]] == [0, 0, 1, 1] and len(tried) == 6 and first.documents == 8
    assert tried[0].kl == pytest.approx(0.5 * math.log(0.5 / (1 / 3)) + 0.5 * math.log(0.5 / (2 / 3)))
    assert max(len(texts) for _, texts in first.model.batches) == 4  # The grid at once.
    chosen = recommend(tried, LIMITS)
    assert chosen is not None and isinstance(chosen.setting, Dial) and chosen.setting.strength == 1
    sweep(first, goal, found_ranking(), tried, chosen)
    whole = first.whole()
    drawn = [one for one in whole.profiles if one.kind == "random"]
    group = [key for key in first.log.runs if isinstance(key[0], Dial) and key[0].group == chosen.setting.group]
    assert len(drawn) == 2 * len([key for key in group if key[1] is None]) and all(one.divergence for one in drawn)
    assert len(whole.profiles) <= 2 + (6 + 2) * 3 and "at most 26 runs of 8 documents and 2 prompts" in goal.cost(8, 2)
    again = bench()
    assert run_search(again, goal, found_ranking(), lambda _: None) == tried and not again.model.prompts


def test_a_strength_is_published_beside_the_numbers_that_were_there(tmp_path: Path) -> None:
    found, registry = found_ranking(), Registry((tmp_path,))
    held = compare(a_run(1.0).model_copy(update={"profiles": [*a_run(0.5).profiles, renamed(a_run(1.0), "other")]}))
    for reverse, numbers in ((False, "recommended"), (True, "recommended_reverse")):
        goal = a_goal(reverse=reverse)
        ranking = new_version(found, goal, Dial(0.75, 12, "sign"), held, registry)
        read = parse_ranking(dump_ranking(ranking), "x")
        new = getattr(read.card, numbers)
        assert read.card.format_version == 2 and (new.activate, new.deactivate) == (6, 6)
        assert (new.strength, new.top, new.by) == (0.75, 12, "sign") and read.card.version == VERSION + 1
    forced = new_version(replace(found, ranking=read), a_goal(), Counts(2, 0), held, registry)
    # The reverse still has its strength.
    assert forced.card.format_version == 2 and forced.card.recommended.strength is None
    plain = new_version(found, a_goal(), Counts(2, 0), held, registry)
    assert parse_ranking(dump_ranking(plain), "x").card.format_version == 1
    with pytest.raises(ComparisonError, match="phase=prompt"):
        new_version(found, a_goal(), Dial(1.0, phase="prompt"), held, registry)


def renamed(run: Run, name: str) -> ProfileRecord:
    return run.profiles[0].model_copy(update={"name": name})


def test_the_command_refuses_before_the_engine_starts() -> None:
    for arguments, message in [
        (["--behaviour", "digits:reverse"], "name one behaviour"),
        (["--behaviour", "digits", "--phases", "sometimes"], "unknown phase"),
        (["--behaviour", "colour"], "unknown behaviour"),
        (["--behaviour", "digits", "--strengths", "much"], "such as 0.5,1,2"),
        (["--behaviour", "digits", "--strengths", "-1"], "--reverse steers away"),
        (["--behaviour", "digits", "--strengths", "1", "--top", "9999"], "experts asked for"),
        (["--behaviour", "digits", "--strengths", "1", "--top", "0"], "numbers of experts, or all"),
        (["--behaviour", "digits", "--strengths", "1", "--weights", "own"], "no weights of its own"),
        (["--behaviour", "digits", "--strengths", "1", "--weights", "signs"], "unknown weights"),
        (["--behaviour", "digits", "--top", "5"], "say --strengths as well"),
        (["--behaviour", "digits", "--random", "5"], "say --strengths as well"),
        (["--behaviour", "digits", "--max-kl", "1"], "--max-kl needs prompts"),
        (["--behaviour", "digits", "--strengths", "1", "--kl-prompts", "controls"], "no control task is named"),
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
