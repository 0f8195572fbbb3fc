"""Routers whose order is not that of their logits, in the real engine, against transformers with a slow loop in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from expert_registry.shape import MoEShape
from tests.support.corrected import EXPERTS, MODELS, CorrectedReference, make_checkpoint
from tests.support.engines import EXACT, model_of
from tests.support.greedy import generate, prompt_logprobs, scoring
from tests.support.oracle import Rules
from tests.support.random_steering import as_text, prompt, random_rules
from vllm_steermoe_plugin.detection.engine_client import take_counts
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans

TOKENS = 24
SETTINGS = {"count_groups": 8 * TOKENS}
OPTIONS: dict[str, Any] = {
    **EXACT,
    # vLLM's kernel for CPUs rotates wrongly where the heads are a dimension of their own (latent attention, LFM2):
    # log-probabilities are then off by 1e-2 and more, steered or not. Its plain version is right.
    "compilation_config": {"custom_ops": ["-rotary_embedding"]},
    "limit_mm_per_prompt": {"image": 0},
}
TOLERANCE = 1e-4
"""Of a log-probability: vLLM and transformers compute in float32, in an order of their own."""


@pytest.fixture(scope="module", autouse=True)
def rotations() -> Iterator[None]:
    """vLLM keeps its rotary embeddings for all engines of a process; those of other tests have the kernel."""
    from vllm.model_executor.layers import rotary_embedding

    kept = dict(rotary_embedding._ROPE_DICT)
    rotary_embedding._ROPE_DICT.clear()
    yield
    rotary_embedding._ROPE_DICT.clear()
    rotary_embedding._ROPE_DICT.update(kept)


def extremes(shape: MoEShape) -> list[Rules]:
    """As many as a layer allows: K activated (of several groups), E - K deactivated, both, in every layer."""
    spread = [e * EXPERTS // shape.top_k for e in range(shape.top_k)]
    others = [e for e in range(EXPERTS) if e not in spread]
    return [
        {(layer, e): 1 for layer in shape.layers for e in spread},
        {(layer, e): -1 for layer in shape.layers for e in others},
        {(layer, e): 1 if e in spread[:2] else -1 for layer in shape.layers for e in [*spread[:2], *others[:6]]},
    ]


@pytest.mark.parametrize(("architecture", "offset"), [*((name, 0.0) for name in MODELS), ("Glm4MoeForCausalLM", 30.0)])
def test_logprobs_and_each_tokens_experts_equal_the_reference(
    architecture: str, offset: float, engines: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = make_checkpoint(architecture, tmp_path_factory.getbasetemp() / f"{architecture}-{offset}", offset)
    reference = CorrectedReference(architecture, folder)
    shape = MoEShape("any", tuple(reference.routers), EXPERTS, MODELS[architecture].router.top_k)
    cases: list[Rules] = [{}, random_rules(shape, 1), random_rules(shape, 2), *extremes(shape)]
    prompts = [prompt(i, TOKENS) for i in range(len(cases))]
    wanted = [reference.run(ids, rules) for ids, rules in zip(prompts, cases, strict=True)]

    engine = engines(str(folder), SETTINGS, **OPTIONS)
    state = model_of(engine).steering_state
    assert state.layers == shape.layers and state.corrects is not MODELS[architecture].at_gate
    engine.collective_rpc("steermoe_reset_counts")
    params = [
        scoring(as_text(rules) if rules else None, CountedSpans(1 + i * TOKENS, ((0, TOKENS),), each=True).to_json())
        for i, rules in enumerate(cases)
    ]
    # One batch: every request steered in its own way, one not at all.
    outputs = generate(engine, prompts, params)
    selections, _ = take_counts(engine, shape.layers)
    for case, (ids, (expected, chosen), output) in enumerate(zip(prompts, wanted, outputs, strict=True)):
        for row, layer in enumerate(shape.layers):
            found = [np.flatnonzero(token[row]).tolist() for token in selections[case * TOKENS : (case + 1) * TOKENS]]
            assert found == chosen[layer], (case, layer)
        np.testing.assert_allclose(
            prompt_logprobs(output), [expected[i, t] for i, t in enumerate(ids[1:])], atol=TOLERANCE
        )


def test_an_expert_with_its_own_weight_is_steered_and_moves_less(
    engines: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    architecture = "Glm4MoeForCausalLM"
    folder = make_checkpoint(architecture, tmp_path_factory.getbasetemp() / f"{architecture}-0.0")
    reference = CorrectedReference(architecture, folder)
    rules: Rules = {(layer, e): 1 for layer in reference.routers for e in (3, 11)}
    ids = prompt(7, TOKENS)
    plain, top = (reference.run(ids, case)[0] for case in ({}, rules))
    own, _ = reference.run(ids, rules, own=True)
    engine = engines(str(folder), SETTINGS, **OPTIONS)
    text = json.dumps(json.loads(as_text(rules)) | {"weight": "own"})
    outputs = generate(engine, [ids] * 3, [scoring(), scoring(as_text(rules)), scoring(text)])
    for expected, output in zip((plain, top, own), outputs, strict=True):
        np.testing.assert_allclose(
            prompt_logprobs(output), [expected[i, t] for i, t in enumerate(ids[1:])], atol=TOLERANCE
        )
    moved = [float(np.abs(prompt_logprobs(output) - prompt_logprobs(outputs[0])).max()) for output in outputs[1:]]
    assert moved[0] > 0.01 and moved[1] > 1e-4
