"""Step 1 of the demo: detect the three behaviours through the engine and rank the experts."""

from __future__ import annotations

from pathlib import Path

from vllm import LLM

from expert_registry import Ranking, Registry
from expert_registry.registry import publish
from expert_registry.statistics import overlap
from vllm_steermoe_plugin.detection.detect import detect
from vllm_steermoe_plugin.detection.engine_client import COUNT_GROUPS
from vllm_steermoe_plugin.detection.recipes.lab import lab_recipe
from vllm_steermoe_plugin.engine import start_engine
from vllm_steermoe_plugin.lab.world import BEHAVIOURS
from vllm_steermoe_plugin.models import lab_checkpoint


def counting_engine() -> LLM:
    """steermoe-lab in this process, counting both sides of pairs."""
    return start_engine(lab_checkpoint.NAME, {"count_groups": COUNT_GROUPS})


def detect_all(engine: LLM, folder: Path, seed: int = 0) -> dict[str, Ranking]:
    """Rankings by behaviour, from the pairs that `seed` draws; stored in the registry folder `folder`."""
    rankings = {}
    for behaviour in BEHAVIOURS:
        pairs, described = lab_recipe(lab_checkpoint.NAME, behaviour, seed)
        rankings[behaviour] = detect(engine, lab_checkpoint.NAME, pairs, described)
        publish(rankings[behaviour], folder, overwrite=True)
    return rankings


def agreement_with_shipped(rankings: dict[str, Ranking], shipped: Registry) -> dict[str, float]:
    """Per behaviour, the share of the recommended experts that the shipped ranking names too."""
    shares = {}
    for behaviour, ranking in rankings.items():
        numbers = ranking.card.recommended
        theirs = shipped.find([lab_checkpoint.NAME], behaviour).ranking
        shares[behaviour] = overlap(ranking.counts, theirs.counts, numbers.activate + numbers.deactivate)
    return shares
