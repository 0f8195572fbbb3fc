"""Detection in the real engine, against counts taken from transformers token by token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams

from expert_registry import Recommended, read_ranking, write_ranking
from tests.support.oracle import ReferenceModel
from tests.support.preemptions import watch_preemptions
from vllm_steermoe_plugin.detection.detect import detect
from vllm_steermoe_plugin.detection.engine_client import COUNT_GROUPS, take_counts
from vllm_steermoe_plugin.detection.pairs import ContrastivePair, PairsError, PairSet, Side, read_pairs
from vllm_steermoe_plugin.detection.recipes.lab import lab_recipe
from vllm_steermoe_plugin.detection.recipes.recipe import Behaviour
from vllm_steermoe_plugin.detection.token_spans import encode_side
from vllm_steermoe_plugin.lab.training.planting import planted
from vllm_steermoe_plugin.lab.world import BEHAVIOURS
from vllm_steermoe_plugin.models import lab_checkpoint
from vllm_steermoe_plugin.models.checkpoints import shape_in
from vllm_steermoe_plugin.steering.wire import COUNT_KEY

BEHAVIOUR = Behaviour("testing", ("one", "two"), False, Recommended(activate=1, deactivate=1))


@pytest.fixture
def engine(engines: Callable[..., Any]) -> Any:
    return engines(lab_checkpoint.NAME, {"count_groups": COUNT_GROUPS}, enable_prefix_caching=False, dtype="float32")


def few(behaviour: str, number: int = 6) -> PairSet:
    pairs, _ = lab_recipe(lab_checkpoint.NAME, behaviour)
    return PairSet(pairs.name, pairs.sha256, pairs.pairs[:number])


def test_counts_equal_the_slow_reference(engine: Any) -> None:
    pairs = few("digits")
    ranking = detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR)
    reference = ReferenceModel(lab_checkpoint.MODEL_DIR)
    tokenizer = engine.get_tokenizer()
    expected = np.zeros((2, len(ranking.shape.layers), ranking.shape.num_experts), dtype=np.int64)
    tokens = [0, 0]
    for pair in pairs.pairs:
        for number, side in enumerate((pair.side_1, pair.side_2)):
            span = encode_side(side, tokenizer, pair.origin)
            _, chosen = reference.run(list(span.token_ids), {})
            tokens[number] += span.stop - span.start
            for row, layer in enumerate(ranking.shape.layers):
                for experts in chosen[layer][span.start : span.stop]:
                    expected[number, row, experts] += 1
    assert ranking.counts.tokens.tolist() == tokens
    np.testing.assert_array_equal(ranking.counts.activations_1, expected[0])
    np.testing.assert_array_equal(ranking.counts.activations_2, expected[1])


def test_chunked_prefill_and_a_warm_prefix_cache_count_the_same(engine: Any, engines: Callable[..., Any]) -> None:
    pairs = few("refusal", 12)
    whole = detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR)
    chunked = engines(
        lab_checkpoint.NAME,
        {"count_groups": COUNT_GROUPS},
        enable_prefix_caching=True,
        dtype="float32",
        max_num_batched_tokens=32,
        max_num_seqs=4,
        block_size=32,
    )
    for _ in range(2):
        again = detect(chunked, lab_checkpoint.NAME, pairs, BEHAVIOUR)
        np.testing.assert_array_equal(again.counts.activations_1, whole.counts.activations_1)
        np.testing.assert_array_equal(again.counts.activations_2, whole.counts.activations_2)


def test_what_comes_before_the_counted_tokens_is_found_in_the_prefix_cache(
    engine: Any, engines: Callable[..., Any]
) -> None:
    """Documents with several questions each: the document is computed once, and each question is counted."""
    documents = [f"{i} " * 40 + "." for i in range(3)]
    pairs = PairSet(
        "made",
        "0" * 64,
        tuple(
            ContrastivePair(Side(None, f"{text} {question}", question), Side(None, question, None), "here")
            for text in documents
            for question in (8 * "Count to 4. ", 9 * "Which numbers run from 1 to 3? ", 8 * "Count to 4. ")
        ),
    )
    expected = detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR)
    cached = engines(
        lab_checkpoint.NAME,
        {"count_groups": 8},
        enable_prefix_caching=True,
        dtype="float32",
        block_size=32,
        disable_log_stats=False,
    )

    def hits() -> float:
        return sum(m.value for m in cached.get_metrics() if m.name == "vllm:prefix_cache_hits")

    for least in (3 * 2 * 32, 3 * 3 * 32):
        before = hits()
        found = detect(cached, lab_checkpoint.NAME, pairs, BEHAVIOUR)
        assert hits() - before >= least
        np.testing.assert_array_equal(found.counts.activations_1, expected.counts.activations_1)
        np.testing.assert_array_equal(found.counts.activations_2, expected.counts.activations_2)


def test_preempted_requests_count_once(engine: Any, tight: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KV cache too small for the batch makes vLLM preempt requests and compute their prompts again."""
    span = json.dumps({"group": 1, "ranges": [[5, 33]]})
    prompts: list[Any] = [{"prompt_token_ids": [5 + i, *range(10, 49)]} for i in range(4)]
    preempted = watch_preemptions(tight, monkeypatch)
    counts = []
    for one in (engine, tight):
        one.collective_rpc("steermoe_reset_counts")
        params = SamplingParams(max_tokens=80, temperature=0.0, ignore_eos=True, extra_args={COUNT_KEY: span})
        one.generate(prompts, params, use_tqdm=False)
        counts.append(take_counts(one, shape_in(lab_checkpoint.MODEL_DIR).layers))
    assert preempted, "the test must really preempt"
    assert counts[1][1][:2].tolist() == [4 * 28, 0]
    np.testing.assert_array_equal(counts[0][0][0], counts[1][0][0])


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_the_planted_experts_are_found(behaviour: str, engine: Any) -> None:
    pairs, described = lab_recipe(lab_checkpoint.NAME, behaviour)
    ranking = detect(engine, lab_checkpoint.NAME, pairs, described)
    for side, sign in ((1, 1), (2, -1)):
        truth = set(planted(behaviour, side))
        found = [e for e in ranking.experts() if sign * e.risk_difference > 0][: len(truth)]
        precision = sum((e.layer, e.expert) in truth for e in found) / len(found)
        assert precision >= 0.7, (behaviour, side, found)


def test_sides_swapped_negate_the_ranking(engine: Any) -> None:
    pairs = few("faithfulness")
    swapped = PairSet("swapped", pairs.sha256, tuple(type(p)(p.side_2, p.side_1, p.origin) for p in pairs.pairs))
    one = detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR).counts.risk_difference()
    two = detect(engine, lab_checkpoint.NAME, swapped, BEHAVIOUR).counts.risk_difference()
    np.testing.assert_array_equal(one, -two)


def test_from_a_file_to_a_ranking_file_and_back(engine: Any, tmp_path: Path) -> None:
    lines = [
        {"text_1": "Count from 2 to 4. 2 3 4", "text_2": "Count from 2 to 4. two three four", "target_1": "2 3 4"},
        {
            "messages_1": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "3 4"}],
            "messages_2": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "three four"}],
        },
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    ranking = detect(engine, lab_checkpoint.NAME, read_pairs(path), BEHAVIOUR)
    write_ranking(ranking, tmp_path / "ranking.safetensors")
    again = read_ranking(tmp_path / "ranking.safetensors")
    assert again.card == ranking.card and again.experts() == ranking.experts()
    assert again.card.data.pairs == 2


def test_a_text_longer_than_the_context_is_named(engine: Any, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"text_1": "one " * 2000, "text_2": "two"}))
    with pytest.raises(PairsError, match=r"pairs\.jsonl, line 1, side 1: \d+ tokens"):
        detect(engine, lab_checkpoint.NAME, read_pairs(path), BEHAVIOUR)
