"""Step 3 of the demo: lm-eval on the test splits, one engine for all steerings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

import lm_eval_tasks
from lm_eval_tasks.models.in_process import SteerMoEVLLM
from vllm_steermoe_plugin.models import lab_checkpoint

Outcomes = list[float]
"""One 0 or 1 per example, in the order of the data set."""


@dataclass(frozen=True, slots=True)
class Evaluator:
    """An lm-eval model whose steering changes between runs, and the project's tasks."""

    model: Any
    tasks: TaskManager

    @classmethod
    def start(cls) -> Evaluator:
        folder = str(lm_eval_tasks.TASKS)
        return cls(
            SteerMoEVLLM(pretrained=lab_checkpoint.NAME, batch_size="auto"),
            TaskManager(include_path=folder, include_defaults=False),
        )

    def run(self, steering: str, tasks: Sequence[str]) -> dict[str, Outcomes]:
        """Outcomes by task, all under `steering`."""
        self.model.use_steering(steering)
        results = lm_eval.simple_evaluate(
            model=self.model, tasks=list(tasks), task_manager=self.tasks, bootstrap_iters=0, verbosity="ERROR"
        )
        return {task: _outcomes(results["samples"][task]) for task in tasks}


def _outcomes(samples: Sequence[dict[str, Any]]) -> Outcomes:
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    return [float(sample[sample["metrics"][0]]) for sample in ordered]
