"""The steerings that the demo compares: unsteered, steered, reversed, and as many random experts."""

from __future__ import annotations

from expert_registry import Ranking
from vllm_steermoe_plugin.steering.request import NONE
from vllm_steermoe_plugin.steering.selection import random_experts


def steerings(behaviour: str) -> dict[str, str]:
    """Name -> request text, for the three steerings that a user would ask for."""
    return {"unsteered": NONE, "steered": behaviour, "reversed": f"{behaviour}:reverse"}


def random_steerings(ranking: Ranking, draws: int) -> list[str]:
    """As many experts as the ranking recommends, drawn at random `draws` times, as explicit expert sets."""
    numbers = ranking.card.recommended
    return [
        random_experts(ranking.shape, activate=numbers.activate, deactivate=numbers.deactivate, seed=seed).to_json()
        for seed in range(draws)
    ]
