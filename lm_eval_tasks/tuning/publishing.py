"""A ranking with tuned numbers in its card."""

from __future__ import annotations

from expert_registry import Ranking, Recommended, Registry
from expert_registry.registry import Found
from expert_registry.revision import revise
from lm_eval_tasks.compare.comparison import Comparison
from lm_eval_tasks.errors import ComparisonError
from lm_eval_tasks.tuning.run import Goal
from lm_eval_tasks.tuning.settings import Dial, Setting


def new_version(found: Found, goal: Goal, chosen: Setting, comparison: Comparison, registry: Registry) -> Ranking:
    """The ranking with the chosen numbers or strength in its card, as the next version.

    A strength leaves the numbers of experts there, for requests that ask for forced experts.

    Raises:
        ComparisonError: the test documents do not bear them out, or a ranking card cannot hold them.
    """
    verdicts = {c.task: c.verdict for c in comparison.changes if c.profile == "tuned" and c.main}
    bad = [f"{task}: {verdict}" for task, verdict in verdicts.items() if verdict not in ("better", "held")]
    if bad:
        raise ComparisonError(f"not published, for the test documents say: {'; '.join(bad)}")
    if chosen.phase != "both":
        raise ComparisonError(
            f"not published: a ranking card holds numbers of experts or a strength, and phase={chosen.phase} is more "
            "than that"
        )
    card = found.ranking.card
    so_far = (card.recommended_reverse if goal.reverse else None) or card.recommended
    if isinstance(chosen, Dial):
        dial = {"strength": chosen.strength, "top": chosen.top, "by": chosen.by}
        numbers = so_far.model_copy(update=dial)
    else:
        numbers = Recommended(activate=chosen.activate, deactivate=chosen.deactivate)
    changed = {"recommended_reverse" if goal.reverse else "recommended": numbers}
    note = f"Tuned from version {card.version} on {', '.join(goal.tasks)}, controls {', '.join(goal.controls)}."
    return revise(found.ranking, registry, note, **changed)
