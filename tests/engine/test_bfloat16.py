"""bfloat16 in the real engine against transformers, per token and layer, wherever rounding leaves the answer certain.

Two implementations sum in different orders, so in bfloat16 their hidden states differ in the last places, and
experts whose scores nearly tie may swap; from there on all differs. So the comparison is in two parts.

* One router at a time, both fed with what vLLM's router was fed: the selected experts are the same for every token
  whose K-th and (K+1)-th score, in float64, are more than `NEAR` apart relative to the largest, and for every token at
  all where a rule decides between these two.
* The whole model: up to the first token that selects otherwise, log-probabilities agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from expert_registry.shape import MoEShape
from tests.support.oracle import ReferenceModel, Rules, rewrite_row
from tests.support.random_steering import as_text, prompt, random_rules
from tests.support.tiny import CONFIGS
from vllm_steermoe_plugin.detection.engine_client import take_counts
from vllm_steermoe_plugin.models.checkpoints import shape_in
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans
from vllm_steermoe_plugin.steering.wire import COUNT_KEY, STEER_KEY
from vllm_steermoe_plugin.worker.gate import SteeredGateLinear

NEAR = 4 * 2.0**-8
"""Relative to a row's largest magnitude: two implementations round twice, by half a unit in the last place each."""
TOLERANCE = {"PhiMoEForCausalLM": 0.2}
"""Of log-probabilities; 0.05 for the others. Phi's weights jump where some expert's score crosses a threshold."""
LENGTH, CASES = 12, 24


@pytest.fixture
def engine(request: pytest.FixtureRequest, engines: Callable[..., Any], checkpoint: Callable[[str], Path]) -> Any:
    folder = checkpoint(request.node.callspec.params["architecture"])
    return engines(str(folder), {"count_groups": LENGTH}, dtype="bfloat16", enable_prefix_caching=False)


def gates_of(engine: Any) -> dict[int, SteeredGateLinear]:
    model = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    gates = [module for module in model.modules() if isinstance(module, SteeredGateLinear) and module.steering]
    return {model.steering_state.layers[gate.steering_row]: gate for gate in gates}


@contextmanager
def router_inputs(engine: Any) -> Iterator[dict[int, torch.Tensor]]:
    """Hidden states `[T, H]` by layer that the gates were fed in the last step."""
    seen: dict[int, torch.Tensor] = {}
    handles = [
        gate.register_forward_pre_hook(lambda _, args, layer=layer: seen.__setitem__(layer, args[0].clone()))
        for layer, gate in gates_of(engine).items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def selected(engine: Any, ids: list[int], rules: Rules, shape: MoEShape) -> tuple[np.ndarray, np.ndarray]:
    """Whether each token selected each expert, bool `[T, L, E]`, and the log-probabilities of the prompt's tokens."""
    engine.collective_rpc("steermoe_reset_counts")
    extra = {COUNT_KEY: CountedSpans(1, ((0, len(ids)),), each=True).to_json()}
    extra |= {STEER_KEY: as_text(rules)} if rules else {}
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, extra_args=extra)
    output = engine.generate({"prompt_token_ids": ids}, params, use_tqdm=False)[0]
    selections, tokens = take_counts(engine, shape.layers)
    assert tokens.tolist() == [1] * len(ids)
    pairs = zip(output.prompt_logprobs[1:], ids[1:], strict=True)
    return selections > 0, np.array([entry[token].logprob for entry, token in pairs])


def open_by_rounding(scores: list[float], rules: dict[int, int], top_k: int) -> bool:
    """Whether K-th and (K+1)-th are so near that rounding may swap them, and no rule decides between them."""
    order = sorted(range(len(scores)), key=lambda e: -scores[e])
    last, next_ = order[top_k - 1], order[top_k]
    near = scores[last] - scores[next_] <= NEAR * max(map(abs, scores))
    return near and rules.get(last, 0) == 0 == rules.get(next_, 0)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_selected_experts_and_logprobs_equal_the_reference(
    architecture: str, engine: Any, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(architecture)
    shape = shape_in(folder)
    reference = ReferenceModel(folder, torch.bfloat16)
    undecided = compared = agreeing = steered_tokens = 0
    for case in range(CASES):
        ids, rules = prompt(case, LENGTH), random_rules(shape, case) if case % 4 else {}
        with router_inputs(engine) as inputs:
            mask, logprobs = selected(engine, ids, rules, shape)
            fed = {layer: hidden.clone() for layer, hidden in inputs.items()}
        same_until = LENGTH
        expected, chosen = reference.run(ids, rules)
        for row, layer in enumerate(shape.layers):
            mine = {expert: rule for (at, expert), rule in rules.items() if at == layer}
            alone = reference.route(layer, fed[layer], rules)
            exact = reference.exact_logits(layer, fed[layer]).tolist()
            for token in range(LENGTH):
                found = np.flatnonzero(mask[token, row]).tolist()
                assert all((expert in found) == (rule > 0) for expert, rule in mine.items()), (case, layer, token)
                scores = rewrite_row(exact[token], mine, torch.float64)
                if open_by_rounding(scores, mine, shape.top_k):
                    undecided += 1
                else:
                    assert found == alone[token], (case, layer, token, scores)
                compared += 1
                if found != chosen[layer][token]:
                    same_until = min(same_until, token)
        # The log-probability of token i + 1 hangs on tokens up to i only.
        np.testing.assert_allclose(
            logprobs[:same_until],
            [expected[i, t] for i, t in enumerate(ids[1 : same_until + 1])],
            atol=TOLERANCE.get(architecture, 0.05),
        )
        agreeing += same_until
        steered_tokens += LENGTH if rules else 0
    assert undecided < 0.1 * compared, "too little was compared"
    assert agreeing > 0.5 * CASES * LENGTH, "too little was compared"
    assert steered_tokens > CASES * LENGTH / 2
