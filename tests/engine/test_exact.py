"""The steerable architectures in the real engine, against transformers with a slow loop in the router."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams

from tests.support.oracle import ReferenceModel, Rules
from tests.support.random_steering import as_text, prompt, random_rules
from tests.support.tiny import CONFIGS
from vllm_steermoe_plugin.detection.engine_client import take_counts
from vllm_steermoe_plugin.models.checkpoints import shape_in
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans
from vllm_steermoe_plugin.steering.wire import COUNT_KEY, STEER_KEY

Checkpoint = Callable[[str], Path]


def scored(engine: Any, requests: list[tuple[list[int], str | None]]) -> list[np.ndarray]:
    """Log-probability of each prompt token after the first, for a batch of (prompt, steering)."""
    params = [
        SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, extra_args={STEER_KEY: s} if s else None
        )
        for _, s in requests
    ]
    outputs = engine.generate([{"prompt_token_ids": p} for p, _ in requests], params, use_tqdm=False)
    return [
        np.array(
            [entry[token].logprob for entry, token in zip(o.prompt_logprobs[1:], o.prompt_token_ids[1:], strict=True)]
        )
        for o in outputs
    ]


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
        SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            detokenize=False,
            extra_args={COUNT_KEY: CountedSpans(group, ((0, len(ids)),)).to_json()}
            | ({STEER_KEY: as_text(rules)} if rules else {}),
        )
        for group, (ids, rules) in enumerate(zip(prompts, cases, strict=True), start=1)
    ]
    # One batch: every request steered in its own way, one not at all.
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    selections, tokens = take_counts(engine, shape.layers)
    assert tokens.tolist() == [len(ids) for ids in prompts]
    for group, (ids, rules, output) in enumerate(zip(prompts, cases, outputs, strict=True)):
        expected, chosen = reference.run(ids, rules)
        found = [entry[t].logprob for entry, t in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
        np.testing.assert_allclose(found, [expected[i, t] for i, t in enumerate(ids[1:])], atol=2e-3)
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
    plain, steered = scored(engine, [(prompt(9), None), (prompt(9), as_text(rules))])
    assert np.abs(plain - steered).max() > 0.01
