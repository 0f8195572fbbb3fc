"""Small detections on the lab model: a few of its own pairs, and whether two rankings are of the same counts."""

from __future__ import annotations

import numpy as np

from expert_registry import Ranking, Recommended
from vllm_steermoe_plugin.detection.pairs import PairSet
from vllm_steermoe_plugin.detection.recipes.lab import lab_recipe
from vllm_steermoe_plugin.detection.recipes.recipe import Behaviour
from vllm_steermoe_plugin.models import lab_checkpoint

BEHAVIOUR = Behaviour("testing", ("one", "two"), False, Recommended(activate=1, deactivate=1))


def few(behaviour: str, number: int) -> PairSet:
    pairs, _ = lab_recipe(lab_checkpoint.NAME, behaviour)
    return PairSet(pairs.name, pairs.sha256, pairs.pairs[:number])


def same(one: Ranking, other: Ranking) -> None:
    assert one.clusters is not None and other.clusters is not None
    for name in ("activations_1", "activations_2", "tokens"):
        np.testing.assert_array_equal(getattr(one.counts, name), getattr(other.counts, name))
    for name, tensor in one.clusters.tensors().items():
        np.testing.assert_array_equal(tensor, other.clusters.tensors()[name], err_msg=name)
