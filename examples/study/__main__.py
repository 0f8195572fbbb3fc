"""`make study`: is the lab model steered by activation alone, by deactivation alone, and from any detection seed?

For each detection seed it detects anew, then measures every behaviour and its control on the
test splits: steered and reversed, by activation, by deactivation and by both, and under draws
of as many random experts. Writes results.json and README.md into examples/study/results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

# Importing the demo sets its environment, which must stand before vLLM is imported.
import examples.demo.__main__  # noqa: F401
from examples.demo.detection import counting_engine, detect_all
from examples.demo.evaluation import Evaluator
from examples.demo.quiet import stderr_to
from examples.study.table import markdown
from expert_registry import Ranking, Recommended
from lm_eval_tasks.compare.intervals import mean_over_draws, paired_change, rate
from vllm_steermoe_plugin.compat.versions import tool_versions
from vllm_steermoe_plugin.lab.training.planting import planted
from vllm_steermoe_plugin.models import lab_checkpoint
from vllm_steermoe_plugin.models.checkpoints import revision_of
from vllm_steermoe_plugin.steering.request import NONE
from vllm_steermoe_plugin.steering.selection import random_experts, select_experts

Cell = dict[str, Any]


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="detection seeds")
    parser.add_argument("--draws", type=int, default=10, help="draws of random experts per mode")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    log = Path("out") / "study.log"
    log.parent.mkdir(exist_ok=True)
    with console.status("detect and start the engine"), stderr_to(log):
        engine = counting_engine()
        detected = {seed: detect_all(engine, Path("out") / f"study-{seed}", seed) for seed in range(arguments.seeds)}
        evaluator = Evaluator.start()
    results: dict[str, Any] = {}
    behaviours = list(detected[0])
    with Progress(console=console) as progress, stderr_to(log):
        steps = len(behaviours) * (1 + 3 * (2 * arguments.seeds + arguments.draws))
        bar = progress.add_task("study", total=steps)

        def measure(steering: str, behaviour: str) -> tuple[list[float], list[float]]:
            task = f"steermoe_lab_{behaviour}"
            outcomes = evaluator.run(steering, [task, f"{task}_control"])
            progress.advance(bar)
            return outcomes[task], outcomes[f"{task}_control"]

        for behaviour in behaviours:
            base, base_control = measure(NONE, behaviour)
            rankings = {seed: found[behaviour] for seed, found in detected.items()}
            modes: dict[str, Cell] = {}
            for mode, numbers in _modes(rankings[0].card.recommended).items():
                cells: list[Cell] = []
                for seed, ranking in rankings.items():
                    for reverse in (False, True):
                        text = _text(ranking, numbers, reverse)
                        after, control = measure(text, behaviour)
                        cells.append(
                            {
                                "seed": seed,
                                "direction": "reversed" if reverse else "steered",
                                "rate": rate(after).to_dict(),
                                "change": paired_change(base, after).to_dict(),
                                "control": rate(control).to_dict(),
                                "control_change": paired_change(base_control, control).to_dict(),
                            }
                        )
                draws = [measure(text, behaviour) for text in _random(rankings[0], numbers, arguments.draws)]
                changes = [rate(after).value - rate(base).value for after, _ in draws]
                modes[mode] = {
                    "activate": numbers.activate,
                    "deactivate": numbers.deactivate,
                    "cells": cells,
                    "random_changes": changes,
                    "random_mean_absolute": mean_over_draws([abs(change) for change in changes]).to_dict(),
                    "random_control_changes": [rate(c).value - rate(base_control).value for _, c in draws],
                }
            results[behaviour] = {
                "unsteered": rate(base).to_dict(),
                "control_unsteered": rate(base_control).to_dict(),
                "detector": {seed: _detector(ranking, behaviour) for seed, ranking in rankings.items()},
                "modes": modes,
            }
    value = {"model": revision_of(lab_checkpoint.NAME), "versions": tool_versions(), "behaviours": results}
    (out / "results.json").write_text(json.dumps(value, indent=1) + "\n")
    (out / "README.md").write_text(markdown(value))
    console.print(f"wrote {out}/results.json and {out}/README.md")


def _modes(recommended: Recommended) -> dict[str, Recommended]:
    """The recommended numbers, and each verb alone."""
    return {
        "both": recommended,
        "activation alone": Recommended(activate=recommended.activate, deactivate=0),
        "deactivation alone": Recommended(activate=0, deactivate=recommended.deactivate),
    }


def _text(ranking: Ranking, numbers: Recommended, reverse: bool) -> str:
    """The experts of `ranking` as an explicit set, so that each seed's own ranking is what steers."""
    selection = select_experts(ranking, activate=numbers.activate, deactivate=numbers.deactivate, reverse=reverse)
    return selection.profile.to_json()


def _random(ranking: Ranking, numbers: Recommended, draws: int) -> list[str]:
    return [
        random_experts(ranking.shape, activate=numbers.activate, deactivate=numbers.deactivate, seed=seed).to_json()
        for seed in range(draws)
    ]


def _detector(ranking: Ranking, behaviour: str) -> dict[str, float]:
    """Share of the planted experts among the first found, per side. As many are taken as were planted, so
    that precision and recall are the same number."""
    shares = {}
    for side, sign in ((1, 1), (2, -1)):
        truth = set(planted(behaviour, side))
        found = [e for e in ranking.experts() if sign * e.risk_difference > 0][: len(truth)]
        shares[f"side {side}"] = sum((e.layer, e.expert) in truth for e in found) / len(truth)
    return shares


if __name__ == "__main__":
    main()
