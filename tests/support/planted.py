"""A registry for the lab model made from what was planted, without detection."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from expert_registry import DataRef, ModelRef, Ranking, RankingCard, Recommended, RoutingCounts
from expert_registry.registry import publish
from vllm_steermoe_plugin.lab.training.planting import planted
from vllm_steermoe_plugin.lab.world import BEHAVIOURS
from vllm_steermoe_plugin.models import lab_checkpoint
from vllm_steermoe_plugin.models.checkpoints import shape_in

TOKENS = 100
VERSION = 900
"""Above those of the bundled rankings, so that these are the newest."""


def planted_ranking(behaviour: str, version: int = VERSION) -> Ranking:
    """Counts as a perfect detector would find them: side 1 on its planted experts, side 2 on its own."""
    shape = shape_in(lab_checkpoint.MODEL_DIR)
    sides = []
    for side in (1, 2):
        counts = np.zeros((len(shape.layers), shape.num_experts), dtype=np.int64)
        for row, layer in enumerate(shape.layers):
            mine = [expert for at, expert in planted(behaviour, side) if at == layer]
            rival = {expert for at, expert in planted(behaviour, 3 - side) if at == layer}
            others = [e for e in range(shape.num_experts) if e not in mine and e not in rival]
            counts[row, (mine + others)[: shape.top_k]] = TOKENS
        sides.append(counts)
    card = RankingCard(
        model=ModelRef(id=lab_checkpoint.NAME, architecture=shape.architecture),
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        behaviour=behaviour,
        version=version,
        sides=("shown", "not shown"),
        data=DataRef(name="planted"),
        span="none",
        recommended=Recommended(activate=6, deactivate=6),
        created="2026-01-01",
        license="Apache-2.0",
    )
    layers = np.asarray(shape.layers, dtype=np.int64)
    return Ranking(RoutingCounts(sides[0], sides[1], np.asarray([TOKENS, TOKENS]), layers), card)


def planted_registry(folder: Path) -> Path:
    """All behaviours, in a registry folder."""
    for behaviour in BEHAVIOURS:
        publish(planted_ranking(behaviour), folder)
    return folder
