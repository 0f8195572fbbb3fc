"""bfloat16 in the real engine against transformers, per token and layer, wherever rounding leaves the answer certain.

Two implementations sum in different orders, so in bfloat16 their hidden states differ in the last places, and
experts whose scores nearly tie may swap; from there on all differs. So the comparison is in two parts, and both sides
are compared with float64, which is the same on every processor.

* One router at a time, fed in float64 with what vLLM's router was fed: the selected experts are the same for every
  token whose K-th and (K+1)-th score are more than `NEAR` apart relative to the largest, and for every token at all
  where a rule decides between these two.
* The whole model: up to the first token that selects otherwise, log-probabilities are as far from float64 as rounding
  can take them, and no further. How far that is, the reference says: `Roundings` puts every rounded result of its
  computation off by a whole unit roundoff u, up or down by chance. An engine's own rounding errors are at most that
  large each, and on average have a third of that variance (uniform within the last place), so with the deviation s of
  a log-probability under `Roundings`:
  - the mean of ((engine - float64) / s)^2 is at most 1/3 (`SPREAD`) for an engine that rounds as often as transformers;
  - by Hoeffding's inequality a sum of such errors exceeds k s with a probability of at most 2 exp(-k^2 / 2): for k = 8
    (`FURTHEST`), less than one in 10^9 for the two thousand log-probabilities that are compared.

A margin of 0.1 in place of 0.01 in the rewrite exceeds the first for all but Phi, whose weights do not show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expert_registry.shape import MoEShape
from tests.support.engines import model_of
from tests.support.greedy import generate, prompt_logprobs, scoring
from tests.support.oracle import ReferenceModel, Rules, forced, rewrite_row, same_until
from tests.support.random_steering import as_text, prompt, random_rules
from tests.support.tiny import CONFIGS
from vllm_steermoe_plugin.detection.engine_client import take_counts
from vllm_steermoe_plugin.models.checkpoints import shape_in
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans
from vllm_steermoe_plugin.worker.gate import SteeredGateLinear

NEAR = 4 * 2.0**-8
"""Relative to a row's largest magnitude: of two scores each is rounded twice, by u at most."""
SPREAD, FURTHEST = 1 / 3, 8.0
COPIES = 32
"""Of the reference under `Roundings`: s is then known within an eighth."""
LENGTH, CASES = 12, 24
ALIKE = ("MixtralForCausalLM", "GraniteMoeSharedForCausalLM", "Qwen2MoeForCausalLM")
"""Their routers are those of others here, so these run each night only."""


@pytest.fixture
def engine(request: pytest.FixtureRequest, engines: Callable[..., Any], checkpoint: Callable[[str], Path]) -> Any:
    folder = checkpoint(request.node.callspec.params["architecture"])
    return engines(str(folder), {"count_groups": LENGTH}, dtype="bfloat16", enable_prefix_caching=False)


def gates_of(engine: Any) -> dict[int, SteeredGateLinear]:
    model = model_of(engine)
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
    count = CountedSpans(1, ((0, len(ids)),), each=True).to_json()
    (output,) = generate(engine, [ids], [scoring(as_text(rules) if rules else None, count)])
    selections, tokens = take_counts(engine, shape.layers)
    assert tokens.tolist() == [1] * len(ids)
    return selections > 0, prompt_logprobs(output)


def open_by_rounding(scores: list[float], largest: float, rules: dict[int, float], top_k: int) -> bool:
    """Whether K-th and (K+1)-th are so near that rounding may swap them, and no rule decides between them."""
    order = sorted(range(len(scores)), key=lambda e: -scores[e])
    last, next_ = order[top_k - 1], order[top_k]
    near = scores[last] - scores[next_] <= NEAR * largest
    return near and not {last, next_} & forced(rules).keys()


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=pytest.mark.nightly if name in ALIKE else ()) for name in CONFIGS]
)
def test_selected_experts_and_logprobs_equal_the_reference(
    architecture: str, engine: Any, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(architecture)
    shape = shape_in(folder)
    # In bfloat16 the margin is a unit in the last place, which hangs on the form.
    form = architecture == "PhiMoEForCausalLM"
    reference = ReferenceModel(folder, torch.float64, torch.bfloat16, log_softmax=form)
    undecided = compared = steered_tokens = 0
    errors: list[np.ndarray] = []
    for case in range(CASES):
        ids, rules = prompt(case, LENGTH), random_rules(shape, case) if case % 4 else {}
        with router_inputs(engine) as inputs:
            mask, logprobs = selected(engine, ids, rules, shape)
            fed = {layer: hidden.clone() for layer, hidden in inputs.items()}
        expected, chosen = reference.run(ids, rules)
        found = {at: [np.flatnonzero(token).tolist() for token in mask[:, row]] for row, at in enumerate(shape.layers)}
        for layer in shape.layers:
            mine = {expert: rule for (at, expert), rule in rules.items() if at == layer}
            for token, logits in enumerate(reference.exact_logits(layer, fed[layer]).tolist()):
                experts = found[layer][token]
                assert all((expert in experts) == (rule > 0) for expert, rule in forced(mine).items()), (
                    case,
                    layer,
                    token,
                )
                scores = rewrite_row(logits, mine, torch.float64, log_softmax=form)
                if open_by_rounding(scores, max(map(abs, logits + scores)), mine, shape.top_k):
                    undecided += 1
                else:
                    best = sorted(sorted(range(len(scores)), key=lambda e: -scores[e])[: shape.top_k])
                    assert experts == best, (case, layer, token, scores)
                compared += 1
        rounded, each = reference.run_rounded(ids, rules, COPIES)
        copies = [{at: each[at][n * LENGTH : (n + 1) * LENGTH] for at in each} for n in range(COPIES)]
        until = np.array([same_until(chosen, copy) for copy in copies])
        # The log-probability of token i + 1 hangs on tokens up to i only.
        for i in range(min(same_until(chosen, found), LENGTH - 1)):
            alike = rounded[until > i, i, ids[i + 1]] - expected[i, ids[i + 1]]
            if len(alike) >= COPIES / 2:
                errors.append((logprobs[i] - expected[i, ids[i + 1]].item()) / alike.square().mean().sqrt().item())
        steered_tokens += LENGTH if rules else 0
    assert undecided < 0.1 * compared, "too little was compared"
    assert len(errors) > 0.5 * CASES * LENGTH, "too little was compared"
    assert steered_tokens > CASES * LENGTH / 2
    assert np.mean(np.square(errors)) <= SPREAD
    assert np.abs(errors).max() <= FURTHEST
