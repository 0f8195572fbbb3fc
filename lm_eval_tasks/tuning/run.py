"""A search on a model: measured on the tuning documents, logged, and judged on others."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from expert_registry import Ranking, Recommended, Registry
from expert_registry.errors import UsageError
from expert_registry.registry import Found
from expert_registry.revision import revise
from lm_eval_tasks.compare.comparison import Comparison, compare
from lm_eval_tasks.compare.pairing import merge_runs
from lm_eval_tasks.compare.run_file import Run
from lm_eval_tasks.errors import ComparisonError
from lm_eval_tasks.evaluation import Options, Steering, evaluate, measure, task_manager
from lm_eval_tasks.tuning.log import TuneLog
from lm_eval_tasks.tuning.search import Setting, Tried, effect, search
from vllm_steermoe_plugin.steering.profile import Phase
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
        margin: what a control may lose.
        phases: to consider.
        most: largest numbers to activate and to deactivate.
        budget: settings to try.
    """

    behaviour: str
    reverse: bool
    tasks: tuple[str, ...]
    controls: tuple[str, ...]
    margin: float
    phases: tuple[Phase, ...]
    most: tuple[int, int]
    budget: int

    def text(self, found: Found, setting: Setting) -> str:
        """The steering request of a setting; the version is pinned."""
        named = Named(
            self.behaviour, found.entry.version, self.reverse, setting.activate, setting.deactivate, setting.phase
        )
        return named.text()


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


def run_search(
    model: Any, goal: Goal, found: Found, options: Options, log: TuneLog, each: Callable[[Tried], None]
) -> list[Tried]:
    """Search; what the log holds is not measured again.

    Raises:
        SteerMoEError: a setting's experts cannot be applied.
    """
    names = [*goal.tasks, *goal.controls]
    manager = task_manager(names, options)
    loaded = manager.load(names)["tasks"]
    main = {task: str(one.config.metric_list[0]["metric"]) for task, one in loaded.items()}
    better = {task: one.higher_is_better().get(main[task]) is not False for task, one in loaded.items()}

    def means(setting: Setting | None) -> dict[str, float]:
        if setting not in log.means:
            text = NONE if setting is None else goal.text(found, setting)
            model.use_steering(text)
            run = measure(model, Steering(text, text), names, manager, options)
            outcomes = run.profiles[0].outcomes
            log.add(setting, {t: sum(o[main[t]]) / len(o[main[t]]) for t, o in outcomes.items()})
        return log.means[setting]

    before = means(None)
    controls = [task for task in before if task not in _members(manager, goal.tasks)]

    def attempt(setting: Setting) -> Tried:
        tried = effect(setting, before, means(setting), controls, better)
        each(tried)
        return tried

    return search(attempt, goal.most, goal.phases, goal.margin, goal.budget)


def judge(
    model: Any, goal: Goal, found: Found, chosen: Setting, tasks: Sequence[str], options: Options
) -> tuple[Run, Comparison]:
    """The chosen setting and the numbers recommended so far, on the test documents."""
    so_far = Named(goal.behaviour, found.entry.version, goal.reverse).text()
    plan = [
        Steering(NONE, NONE, "none"),
        Steering("tuned", goal.text(found, chosen)),
        Steering("recommended so far", so_far),
    ]
    run = evaluate(model, plan, tasks, options)
    return run, compare(merge_runs([run]), NONE, goal.margin)


def new_version(found: Found, goal: Goal, chosen: Setting, comparison: Comparison, registry: Registry) -> Ranking:
    """The ranking with the chosen numbers in its card, as the next version.

    Raises:
        ComparisonError: the test documents do not bear them out, or a ranking card cannot hold them.
    """
    verdicts = {c.task: c.verdict for c in comparison.changes if c.profile == "tuned" and c.main}
    bad = [f"{task}: {verdict}" for task, verdict in verdicts.items() if verdict not in ("better", "held")]
    if bad:
        raise ComparisonError(f"not published, for the test documents say: {'; '.join(bad)}")
    if chosen.phase != "both":
        raise ComparisonError(
            f"not published: a ranking card holds numbers of experts, and phase={chosen.phase} is more than that"
        )
    card = found.ranking.card
    numbers = Recommended(activate=chosen.activate, deactivate=chosen.deactivate)
    note = f"Numbers tuned from version {card.version} on {', '.join(goal.tasks)}, controls {', '.join(goal.controls)}."
    changed = {"recommended_reverse": numbers} if goal.reverse else {"recommended": numbers}
    return revise(found.ranking, registry, note, **changed)


def _members(manager: Any, names: Sequence[str]) -> set[str]:
    """Tasks behind names of tasks and groups."""
    return set(manager.load(list(names))["tasks"])
