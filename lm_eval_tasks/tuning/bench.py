"""Where a search measures: one model, the tuning documents, the prompts of the divergence, and the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_tasks.compare.pairing import merge_runs
from lm_eval_tasks.compare.run_file import Run
from lm_eval_tasks.divergence import divergences
from lm_eval_tasks.evaluation import Options, Steering, measure
from lm_eval_tasks.tuning.log import Key, TuneLog


@dataclass(frozen=True, slots=True)
class Bench:
    """Attributes are as in `evaluation.measure`, and:

    Attributes:
        prompts: after which the divergence is measured; none for no divergence.
        log: what was measured before, and is not measured again.
    """

    model: Any
    tasks: Sequence[str]
    manager: Any
    options: Options
    prompts: Sequence[str]
    log: TuneLog

    @property
    def documents(self) -> int:
        """How many documents one steering is measured on."""
        loaded = self.manager.load(list(self.tasks))["tasks"]
        chosen = self.options.samples or {}
        return sum(len(chosen.get(name, task.eval_docs)) for name, task in loaded.items())

    def measure(self, plan: dict[Key, Steering]) -> list[Run]:
        """A run for each, in that order.

        The divergences of all that the log has not come from one batch, since each request carries its own steering.

        Raises:
            SteerMoEError: a steering cannot be applied.
        """
        new = {key: steering for key, steering in plan.items() if key not in self.log.runs}
        found = divergences(self.model, self.prompts, [steering.text for steering in new.values()])
        for (key, steering), divergence in zip(new.items(), found, strict=True):
            self.model.use_steering(steering.text)
            run = measure(self.model, steering, self.tasks, self.manager, self.options)
            (profile,) = run.profiles
            updated = profile.model_copy(update={"divergence": divergence})
            self.log.add(key, run.model_copy(update={"profiles": [updated]}))
        return [self.log.runs[key] for key in plan]

    def whole(self) -> Run:
        """All that was measured so far, in one run."""
        return merge_runs(list(self.log.runs.values()))
