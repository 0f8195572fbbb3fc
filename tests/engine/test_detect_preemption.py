"""Counted requests that share prefixes in a prefix cache so small that vLLM preempts, in the real engine.

A token that is found in the cache is not routed again, and one that a preempted request computes again is routed
twice; each must count once all the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams

from tests.support.preemptions import watch_preemptions
from vllm_steermoe_plugin.detection.engine_client import COUNT_GROUPS, take_counts
from vllm_steermoe_plugin.models import lab_checkpoint
from vllm_steermoe_plugin.models.checkpoints import shape_in
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans
from vllm_steermoe_plugin.steering.wire import COUNT_KEY

BLOCK = 32
REQUESTS = 16


@pytest.fixture
def plain(engines: Callable[..., Any]) -> Any:
    """Without a prefix cache, and with room for all."""
    return engines(lab_checkpoint.NAME, {"count_groups": COUNT_GROUPS}, enable_prefix_caching=False, dtype="float32")


@pytest.fixture
def small(engines: Callable[..., Any]) -> Any:
    """With a prefix cache of ten blocks, four requests at once and few tokens in a step."""
    return engines(
        lab_checkpoint.NAME,
        {"count_groups": COUNT_GROUPS},
        enable_prefix_caching=True,
        dtype="float32",
        max_model_len=160,
        max_num_batched_tokens=48,
        block_size=BLOCK,
        num_gpu_blocks_override=11,
        max_num_seqs=4,
        disable_log_stats=False,
    )


def metric(engine: Any, name: str) -> float:
    return sum(m.value for m in engine.get_metrics() if m.name == name)


def drawn(chance: random.Random) -> tuple[list[Any], list[SamplingParams], list[int]]:
    """Prompts of a shared beginning and an end of their own, with random counted ranges; tokens per group."""
    beginnings = [[chance.randrange(5, 90) for _ in range(2 * BLOCK)] for _ in range(3)]
    prompts: list[Any] = []
    params, expected = [], []
    for group in range(1, REQUESTS + 1):
        start = chance.choice(beginnings)[: chance.choice((0, 40, 2 * BLOCK))]
        tokens = start + [chance.randrange(5, 90) for _ in range(chance.randint(8, 30))]
        lowest = chance.choice((0, len(start)))
        edges = sorted(chance.sample(range(lowest, len(tokens) + 1), 2 * chance.randint(1, 3)))
        spans = CountedSpans(group, tuple(zip(edges[::2], edges[1::2], strict=True)))
        counted = chance.random() < 0.8
        extra_args = {COUNT_KEY: spans.to_json()} if counted else None
        prompts.append({"prompt_token_ids": tokens})
        params.append(
            SamplingParams(
                max_tokens=chance.randint(20, 60),
                temperature=0.0,
                ignore_eos=True,
                detokenize=False,
                extra_args=extra_args,
            )
        )
        expected.append(spans.tokens if counted else 0)
    return prompts, params, expected


def test_preempted_requests_that_share_prefixes_count_each_token_once(
    plain: Any, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = shape_in(lab_checkpoint.MODEL_DIR).layers
    preempted, hits = watch_preemptions(small, monkeypatch), metric(small, "vllm:prefix_cache_hits")
    for seed in range(4):
        prompts, params, expected = drawn(random.Random(seed))
        found = []
        for engine in (plain, small):
            engine.collective_rpc("steermoe_reset_counts")
            engine.generate(prompts, params, use_tqdm=False)
            selections, tokens = take_counts(engine, layers)
            assert tokens[:REQUESTS].tolist() == expected and not tokens[REQUESTS:].any()
            found.append(selections)
        np.testing.assert_array_equal(found[0], found[1])
    assert preempted, "the test must really preempt"
    assert metric(small, "vllm:prefix_cache_hits") - hits >= 4 * BLOCK, "and prefixes must really be found"
