"""A search on a model: measured on the tuning documents, logged, and judged on others."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from expert_registry import Ranking
from expert_registry.errors import UsageError
from expert_registry.registry import Found
from lm_eval_tasks.compare.comparison import Comparison, compare
from lm_eval_tasks.compare.pairing import merge_runs
from lm_eval_tasks.compare.run_file import Run
from lm_eval_tasks.evaluation import Options, Steering, evaluate, random_steering
from lm_eval_tasks.tuning.bench import Bench
from lm_eval_tasks.tuning.log import Key
from lm_eval_tasks.tuning.search import Limits, Tried, effect, search
from lm_eval_tasks.tuning.settings import Counts, Dial, DialSpace, Setting, Space
from vllm_steermoe_plugin.steering.request import NONE, Named

Split = dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class Goal:
    """What to tune, and on what.

    Attributes:
        behaviour: such as `digits`.
        reverse: away from it.
        tasks: whose gain counts.
        controls: which must hold.
        limits: what counts as held.
        spaces: what to try.
        budget: settings to try.
        draws: random controls of each strength of the best curve.
    """

    behaviour: str
    reverse: bool
    tasks: tuple[str, ...]
    controls: tuple[str, ...]
    limits: Limits
    spaces: tuple[Space, ...]
    budget: int
    draws: int = 0

    def text(self, found: Found, setting: Setting) -> str:
        """The steering request of a setting; the version is pinned."""
        return setting.named(self.behaviour, found.entry.version, self.reverse).text()

    def so_far(self, found: Found) -> str:
        """The steering request of what the ranking recommends so far."""
        return Named(self.behaviour, found.entry.version, self.reverse).text()

    def cost(self, documents: int, prompts: int) -> str:
        """The most that a search measures, in words."""
        curve = sum(len(space.strengths) for space in self.spaces if isinstance(space, DialSpace))
        drawn = f", {self.draws} random controls for each of its strengths" if self.draws else ""
        swept = f"; a curve of {curve} strengths or more{drawn}" if curve else ""
        after = f" and {prompts} prompts" if prompts else ""
        most = 2 + (self.budget + curve) * (1 + self.draws)
        return f"at most {self.budget} settings{swept}: at most {most} runs of {documents} documents{after}"


def largest_numbers(ranking: Ranking, reverse: bool) -> tuple[int, int]:
    """How many experts of a ranking can be activated and deactivated.

    In each layer at most K can be activated, and K must remain when others are deactivated.
    """
    sign = -1 if reverse else 1
    card = ranking.card
    up = sum(sign * expert.risk_difference > 0 for expert in ranking.experts())
    room = dict.fromkeys(ranking.shape.layers, card.num_experts - card.top_k)
    down = 0
    for expert in ranking.experts():
        if sign * expert.risk_difference < 0:
            room[expert.layer] -= 1
            if room[expert.layer] < 0:
                break
            down += 1
    return min(up, card.top_k * len(ranking.shape.layers)), down


def split_documents(manager: Any, tasks: Sequence[str], seed: int = 0) -> tuple[Split, Split]:
    """Indices of each task's documents, drawn into two halves: for tuning and for the test.

    Raises:
        UsageError: a task has fewer than ten documents.
    """
    tuning: Split = {}
    test: Split = {}
    for task, loaded in manager.load(list(tasks))["tasks"].items():
        indices = list(range(len(loaded.eval_docs)))
        if len(indices) < 10:
            raise UsageError(f"{task} has {len(indices)} documents, too few to tune on one half and test on the other")
        random.Random(f"{task} {seed}").shuffle(indices)
        middle = len(indices) // 2
        tuning[task], test[task] = sorted(indices[:middle]), sorted(indices[middle:])
    return tuning, test


def run_search(bench: Bench, goal: Goal, found: Found, each: Callable[[Tried], None]) -> list[Tried]:
    """Search; what the log holds is not measured again.

    Raises:
        SteerMoEError: a setting's experts cannot be applied.
    """
    unsteered, *_ = bench.measure({(None, None): Steering(NONE, NONE, "none"), **_forced_so_far(goal, found)})
    before = _means(unsteered)
    better = {task: record.metrics[_main(unsteered, task)] for task, record in unsteered.tasks.items()}
    gaining = set(bench.manager.load(list(goal.tasks))["tasks"])
    controls = [task for task in before if task not in gaining]

    def attempt(settings: Sequence[Setting]) -> list[Tried]:
        runs = bench.measure({(one, None): _steering(goal, found, one) for one in settings})
        tried = []
        for setting, run in zip(settings, runs, strict=True):
            kl = float(np.mean(run.profiles[0].divergence)) if bench.prompts else None
            tried.append(effect(setting, before, _means(run), controls, better, kl))
            each(tried[-1])
        return tried

    return search(attempt, goal.spaces, goal.limits, goal.budget)


def sweep(bench: Bench, goal: Goal, found: Found, tried: Sequence[Tried], chosen: Tried | None) -> None:
    """Complete the dose-response curve of the chosen strength, or of the one that gained most; with random controls."""
    dials = {one: one.setting for one in tried if isinstance(one.setting, Dial)}
    if not dials:
        return
    group = dials[chosen if chosen in dials else max(dials, key=lambda one: one.gain)].group
    grid = {strength for space in goal.spaces if isinstance(space, DialSpace) for strength in space.strengths}
    strengths = grid | {one.strength for one in dials.values() if one.group == group}
    plan: dict[Key, Steering] = {}
    for setting in (replace(group, strength=strength) for strength in sorted(strengths)):
        steering, profile = _steering(goal, found, setting), setting.profile(found.ranking, goal.reverse)
        plan[setting, None] = steering
        for seed in range(goal.draws):
            plan[setting, seed] = random_steering(steering.name, profile, bench.model.shape, seed)
    bench.measure(plan)


def judge(
    model: Any, goal: Goal, found: Found, chosen: Setting, tasks: Sequence[str], options: Options
) -> tuple[Run, Comparison]:
    """The chosen setting and what is recommended so far, on the test documents."""
    plan = [
        Steering(NONE, NONE, "none"),
        Steering("tuned", goal.text(found, chosen)),
        Steering("recommended so far", goal.so_far(found)),
    ]
    run = evaluate(model, plan, tasks, options)
    return run, compare(merge_runs([run]), NONE, goal.limits.margin)


def _forced_so_far(goal: Goal, found: Found) -> dict[Key, Steering]:
    """The forced experts recommended so far, beside which a dose-response curve is seen."""
    card, text = found.ranking.card, goal.so_far(found)
    numbers = (card.recommended_reverse if goal.reverse else None) or card.recommended
    strengths = any(isinstance(space, DialSpace) for space in goal.spaces)
    if not strengths or numbers.strength is not None or not (numbers.activate or numbers.deactivate):
        return {}
    return {(Counts(numbers.activate, numbers.deactivate), None): Steering(text, text)}


def _steering(goal: Goal, found: Found, setting: Setting) -> Steering:
    text = goal.text(found, setting)
    return Steering(text, text)


def _main(run: Run, task: str) -> str:
    return next(iter(run.tasks[task].metrics))


def _means(run: Run) -> dict[str, float]:
    """Of the main metric of every task."""
    outcomes = run.profiles[0].outcomes
    return {task: float(np.mean(outcomes[task][_main(run, task)])) for task in run.tasks}
