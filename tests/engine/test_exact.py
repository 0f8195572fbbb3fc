"""The steerable architectures in the real engine, against transformers with a slow loop in the router."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.greedy import generate, prompt_logprobs, scoring
from tests.support.oracle import ReferenceModel, Rules
from tests.support.random_steering import as_text, prompt, random_rules
from tests.support.tiny import CONFIGS
from vllm_steermoe_plugin.detection.engine_client import take_counts
from vllm_steermoe_plugin.models.checkpoints import shape_in
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans

Checkpoint = Callable[[str], Path]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_logprobs_and_selected_experts_equal_the_reference(
    architecture: str, tiny: Callable[[str], Any], checkpoint: Checkpoint
) -> None:
    folder = checkpoint(architecture)
    engine = tiny(architecture)
    reference = ReferenceModel(folder)
    shape = shape_in(folder)
    assert set(reference.routers) == set(shape.layers)
    cases: list[Rules] = [{}, random_rules(shape, 1), random_rules(shape, 2), random_rules(shape, 3)]
    prompts = [prompt(i) for i in range(len(cases))]
    engine.collective_rpc("steermoe_reset_counts")
    params = [
        scoring(as_text(rules) if rules else None, CountedSpans(group, ((0, len(ids)),)).to_json())
        for group, (ids, rules) in enumerate(zip(prompts, cases, strict=True), start=1)
    ]
    # One batch: every request steered in its own way, one not at all.
    outputs = generate(engine, prompts, params)
    selections, tokens = take_counts(engine, shape.layers)
    assert tokens.tolist() == [len(ids) for ids in prompts]
    for group, (ids, rules, output) in enumerate(zip(prompts, cases, outputs, strict=True)):
        expected, chosen = reference.run(ids, rules)
        np.testing.assert_allclose(prompt_logprobs(output), [expected[i, t] for i, t in enumerate(ids[1:])], atol=2e-3)
        for row, layer in enumerate(shape.layers):
            counts = np.zeros(shape.num_experts, dtype=np.int64)
            for experts in chosen[layer]:
                counts[experts] += 1
            assert selections[group, row].tolist() == counts.tolist(), (architecture, group, layer)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_steering_changes_the_output(architecture: str, tiny: Callable[[str], Any], checkpoint: Checkpoint) -> None:
    folder = checkpoint(architecture)
    engine = tiny(architecture)
    rules = random_rules(shape_in(folder), 1)
    outputs = generate(engine, [prompt(9)] * 2, [scoring(), scoring(as_text(rules))])
    plain, steered = map(prompt_logprobs, outputs)
    assert np.abs(plain - steered).max() > 0.01
