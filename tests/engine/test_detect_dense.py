"""Detection and attribution in a model of which one layer in the middle has no experts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from expert_registry import Recommended
from tests.support.oracle import ReferenceModel
from tests.support.tiny import COMMON
from vllm_steermoe_plugin.detection.attribution import attribute
from vllm_steermoe_plugin.detection.detect import detect
from vllm_steermoe_plugin.detection.loop import DetectionOptions
from vllm_steermoe_plugin.detection.pairs import PairSet
from vllm_steermoe_plugin.detection.recipes.recipe import Behaviour
from vllm_steermoe_plugin.detection.token_spans import encode_side
from vllm_steermoe_plugin.models import lab_checkpoint

TEXTS = ("Count from 2 to 4. 2 3 4", "Count from 2 to 4. two three four", "the lantern is red", "What colour is it?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE whose layer 1 is dense, with the lab's tokenizer and no chat template."""
    path = tmp_path_factory.mktemp("dense")
    config = transformers.Qwen3MoeConfig(
        **COMMON | {"vocab_size": 896},
        intermediate_size=64,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.normal_(std=1.0)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(lab_checkpoint.MODEL_DIR / name, path)
    return path


def test_layers_keep_the_checkpoints_numbers(folder: Path, engines: Callable[..., Any]) -> None:
    options = {"enable_prefix_caching": False, "skip_tokenizer_init": False, "dtype": "float32"}
    engine = engines(str(folder), {"count_groups": 8}, **options)
    rows = [(f"row {i}", {"text_1": one, "text_2": two}) for i, (one, two) in enumerate((TEXTS[:2], TEXTS[2:]))]
    pairs = PairSet.from_rows("made", rows)
    behaviour = Behaviour("testing", ("one", "two"), False, Recommended(activate=1, deactivate=1))
    ranking = detect(engine, "some/model", pairs, behaviour, options=DetectionOptions(permutations=9))
    assert ranking.shape.layers == (0, 2) and {expert.layer for expert in ranking.experts()} == {0, 2}
    reference, tokenizer = ReferenceModel(folder), engine.get_tokenizer()
    expected = np.zeros((2, 2, 8), dtype=np.int64)
    for pair in pairs.pairs:
        for number, side in enumerate((pair.side_1, pair.side_2)):
            span = encode_side(side, tokenizer, pair.origin)
            _, chosen = reference.run(list(span.token_ids), {})
            for row, layer in enumerate((0, 2)):
                for experts in chosen[layer][span.start : span.stop]:
                    expected[number, row, experts] += 1
    np.testing.assert_array_equal(ranking.counts.activations_1, expected[0])
    np.testing.assert_array_equal(ranking.counts.activations_2, expected[1])

    tokens = attribute(engine, ranking, TEXTS[0])
    differences = {(e.layer, e.expert): e.risk_difference for e in ranking.experts()}
    _, chosen = reference.run(tokenizer(TEXTS[0])["input_ids"], {})
    for place, token in enumerate(tokens):
        mine = [differences[layer, expert] for layer in (0, 2) for expert in chosen[layer][place]]
        assert token.score == pytest.approx(sum(mine) / 2)
