"""A checkpoint with constants in place of some experts (vLLM 0.33): rules and counts keep their numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.engines import EXACT
from tests.support.greedy import generate, prompt_logprobs, scoring
from tests.support.random_steering import as_text, prompt
from vllm_steermoe_plugin.detection.engine_client import take_counts
from vllm_steermoe_plugin.models.checkpoints import shape_in
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans

ARCHITECTURE = "OlmoeForCausalLM"
CONSTANTS = {0: (2,), 2: (0, 5)}
"""Layer -> experts."""
pytestmark = pytest.mark.skipif(
    find_spec("vllm.model_executor.models.expert_substitution") is None, reason="this vLLM substitutes no experts"
)


@pytest.fixture
def substituted(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    folder = tmp_path / "substituted"
    shutil.copytree(checkpoint(ARCHITECTURE), folder)
    config = json.loads((folder / "config.json").read_text())
    config["approximate_experts"] = {str(layer): list(experts) for layer, experts in CONSTANTS.items()}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for layer, experts in CONSTANTS.items():
        for expert in experts:
            prefix = f"model.layers.{layer}.mlp.experts.{expert}."
            gone = [name for name in weights if name.startswith(prefix)]
            assert len(gone) == 3
            for name in gone:
                del weights[name]
            weights[f"{prefix}approx_value"] = torch.full((config["hidden_size"],), 0.5)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_rules_and_counts_name_the_checkpoints_experts(
    substituted: Path, engines: Callable[..., Any], tiny: Callable[[str], Any]
) -> None:
    shape = shape_in(substituted)
    assert (shape.num_experts, len(shape.layers)) == (8, 3)
    # Without the constants, and with experts that have other rows now, both models compute the same.
    without = {(layer, expert): -1 for layer, experts in CONSTANTS.items() for expert in experts}
    cases = [without, without | {(0, 3): 1, (2, 7): 1, (2, 1): -1}]
    with_one = {(2, 5): 1}
    prompts = [prompt(i) for i in range(3)]
    found = []
    for engine in (tiny(ARCHITECTURE), engines(str(substituted), {"count_groups": 4}, **EXACT)):
        engine.collective_rpc("steermoe_reset_counts")
        spans = [CountedSpans(group, ((0, len(ids)),)).to_json() for group, ids in enumerate(prompts, start=1)]
        params = [scoring(as_text(rules), span) for rules, span in zip([*cases, with_one], spans, strict=True)]
        outputs = generate(engine, prompts, params)
        found.append(([prompt_logprobs(output) for output in outputs], take_counts(engine, shape.layers)[0]))
    (whole, whole_counts), (fewer, counts) = found
    for row, rules in enumerate(cases):
        np.testing.assert_allclose(fewer[row], whole[row], atol=1e-4)
        assert counts[row].tolist() == whole_counts[row].tolist()
        assert all(counts[row, layer, expert] == 0 for (layer, expert), rule in rules.items() if rule < 0)
    tokens = len(prompts[2])
    assert counts[2, 2, 5] == tokens, "an activated constant is selected for every token"
    assert np.abs(fewer[2] - whole[2]).max() > 0.01
