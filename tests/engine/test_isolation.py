"""Requests beside each other in the real engine: the unsteered are untouched, the prefix cache is kept apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.alone import run_alone
from tests.support.greedy import answer, asking, generate, run
from tests.support.random_steering import as_text, prompt, random_rules
from vllm_steermoe_plugin.models.checkpoints import shape_in

Engines = Callable[..., Any]
Checkpoint = Callable[[str], Path]
ARCHITECTURE = "Qwen3MoeForCausalLM"


@pytest.fixture
def engine(tiny: Callable[[str], Any]) -> Any:
    return tiny(ARCHITECTURE)


@pytest.fixture
def steering(checkpoint: Checkpoint) -> list[str]:
    shape = shape_in(checkpoint(ARCHITECTURE))
    return [as_text(random_rules(shape, seed)) for seed in range(6)]


def test_unsteered_beside_steered_equals_unsteered_beside_unsteered_bit_for_bit(
    engine: Any, steering: list[str]
) -> None:
    neighbours = [prompt(i + 1) for i in range(6)]
    alone = run(engine, [(prompt(0), None), *((ids, None) for ids in neighbours)])[0]
    mixed = run(engine, [(prompt(0), None), *zip(neighbours, steering, strict=True)])[0]
    assert alone[0] == mixed[0]
    np.testing.assert_array_equal(alone[1], mixed[1])


def test_steered_gives_the_same_in_every_mix(engine: Any, steering: list[str]) -> None:
    alone = run(engine, [(prompt(0), steering[0])])[0]
    beside_others = run(engine, [(prompt(i), steering[i]) for i in (3, 0, 5)])[1]
    beside_unsteered = run(engine, [(prompt(1), None), (prompt(0), steering[0])])[1]
    assert alone[0] == beside_others[0] == beside_unsteered[0]
    # The batch size chooses among matrix kernels, which sum in another order.
    np.testing.assert_allclose(alone[1], beside_others[1], atol=1e-4)
    np.testing.assert_allclose(alone[1], beside_unsteered[1], atol=1e-4)


def test_an_explicit_set_equals_its_reordered_text(engine: Any) -> None:
    one = run(engine, [(prompt(0), '{"activate": {"0": [1, 2], "2": [3]}, "deactivate": {"2": [4]}}')])[0]
    two = run(engine, [(prompt(0), '{"deactivate": {"2": [4]}, "activate": {"2": [3], "0": [2, 1]}}')])[0]
    assert one[0] == two[0]
    np.testing.assert_array_equal(one[1], two[1])


def test_none_is_unsteered(engine: Any) -> None:
    plain, none = run(engine, [(prompt(0), None)])[0], run(engine, [(prompt(0), "none")])[0]
    assert plain[0] == none[0]
    np.testing.assert_array_equal(plain[1], none[1])


def test_phases_split_the_request(engine: Any, steering: list[str]) -> None:
    both = steering[0]
    only_prompt = both[:-1] + ', "phase": "prompt"}'
    only_generation = both[:-1] + ', "phase": "generation"}'
    results = {
        name: run(engine, [(prompt(0), text)], 4)[0][1]
        for name, text in (("none", None), ("both", both), ("prompt", only_prompt), ("generation", only_generation))
    }
    # The first token is decided by the prompt's last position: generation steering cannot reach it.
    assert results["generation"][0] == results["none"][0]
    assert results["prompt"][0] == results["both"][0]
    assert results["prompt"][0] != results["none"][0]


def test_prefix_cache_is_kept_apart_and_still_hits(
    engines: Engines, checkpoint: Checkpoint, steering: list[str]
) -> None:
    folder = checkpoint(ARCHITECTURE)
    cached = engines(str(folder), dtype="float32", enable_prefix_caching=True, block_size=32)
    ids = prompt(7, 100)

    def ask(steer: str | None) -> tuple[np.ndarray, int]:
        (output,) = generate(cached, [ids], [asking(steer, max_tokens=2, logprobs=1)])
        return answer(output)[1], output.num_cached_tokens

    cold = {steer: ask(steer) for steer in (None, steering[0], steering[1])}
    assert all(hit == 0 for _, hit in cold.values()), "one steering read another's cached blocks"
    for steer, (expected, _) in cold.items():
        warm, hit = ask(steer)
        assert hit >= 64, "the cache must hit within one steering"
        np.testing.assert_allclose(warm, expected, atol=1e-4)


def test_chunked_prefill_gives_what_one_prefill_gives(
    engines: Engines, checkpoint: Checkpoint, engine: Any, steering: list[str]
) -> None:
    folder = checkpoint(ARCHITECTURE)
    chunked = engines(
        str(folder), {"count_groups": 4}, dtype="float32", enable_prefix_caching=False, max_num_batched_tokens=16
    )
    requests = [(prompt(i, 40), steer) for i, steer in enumerate([None, steering[0], steering[1]])]
    for one, other in zip(run(engine, requests), run(chunked, requests), strict=True):
        assert one[0] == other[0]
        np.testing.assert_allclose(one[1], other[1], atol=1e-4)


def test_more_profiles_than_slots_over_time(engine: Any, checkpoint: Checkpoint) -> None:
    shape = shape_in(checkpoint(ARCHITECTURE))
    texts = [as_text(random_rules(shape, 100 + seed)) for seed in range(20)]
    together = run(engine, [(prompt(0), text) for text in texts], 2)
    for text, result in list(zip(texts, together, strict=True))[::5]:
        alone = run(engine, [(prompt(0), text)], 2)[0]
        np.testing.assert_allclose(alone[1], result[1], atol=1e-4)


_SCRIPT = """
import sys, json
from vllm import LLM, SamplingParams
from tests.support.engines import EXACT, SMALL, TINY
llm = LLM(sys.argv[1], **SMALL, **TINY, **EXACT)
prompts, steerings = json.loads(sys.argv[2])
params = [SamplingParams(max_tokens=6, temperature=0.0, logprobs=1, ignore_eos=True, detokenize=False,
                         extra_args={"steermoe": s} if s else None) for s in steerings]
outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
print("RESULT" + json.dumps([[list(o.outputs[0].token_ids),
      [e[t].logprob for e, t in zip(o.outputs[0].logprobs, o.outputs[0].token_ids)]] for o in outputs]))
"""


def generate_alone(folder: Path, requests: list[tuple[list[int], str | None]], **environment: str) -> Any:
    """Tokens and log-probabilities from an engine in a process of its own.

    Of its own, because vLLM's CPU kernels keep state: once a bfloat16 GPT-OSS has run in a process, a float32
    one there gives other bits, with or without this plugin.
    """
    arguments = json.dumps([[ids for ids, _ in requests], [steer for _, steer in requests]])
    return run_alone(_SCRIPT, str(folder), arguments, **environment)


@pytest.mark.parametrize(
    "architecture", ["OlmoeForCausalLM", pytest.param("GptOssForCausalLM", marks=pytest.mark.nightly)]
)
def test_unsteered_equals_vllm_without_the_plugin_bit_for_bit(architecture: str, checkpoint: Checkpoint) -> None:
    """Alone and beside steered requests: the neighbours differ only in being steered."""
    folder = checkpoint(architecture)
    prompts = [prompt(i) for i in range(6)]
    steer = as_text(random_rules(shape_in(folder), 1))
    unsteered: list[tuple[list[int], str | None]] = [(ids, None) for ids in prompts]
    beside = [(ids, steer if i % 2 else None) for i, ids in enumerate(prompts)]
    stock = generate_alone(folder, unsteered, VLLM_PLUGINS="")
    assert generate_alone(folder, unsteered) == stock
    mixed = generate_alone(folder, beside)
    assert mixed[0::2] == stock[0::2]
    assert mixed[1::2] != stock[1::2], "the neighbours must really have been steered"


def test_steering_by_phase_does_not_depend_on_what_the_prefix_cache_holds(
    engines: Engines, checkpoint: Checkpoint, steering: list[str]
) -> None:
    """What one turn generated is the next turn's prompt, and the other phase."""
    cached = engines(str(checkpoint(ARCHITECTURE)), dtype="float32", enable_prefix_caching=True, block_size=32)
    only_generation = steering[0][:-1] + ', "phase": "generation"}'

    def ask(ids: list[int], max_tokens: int) -> tuple[list[int], np.ndarray]:
        return run(cached, [(ids, only_generation)], max_tokens)[0]

    first_turn = prompt(8, 50)
    answer, _ = ask(first_turn, 60)
    warm = ask(first_turn + answer, 3)
    cached.reset_prefix_cache()
    cold = ask(first_turn + answer, 3)
    assert warm[0] == cold[0]
    np.testing.assert_array_equal(warm[1], cold[1])
