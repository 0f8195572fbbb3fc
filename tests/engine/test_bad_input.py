"""What cannot be steered fails before it runs, in the user's own process too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from expert_registry.errors import ConfigurationError
from tests.support.engines import start
from vllm_steermoe_plugin.steering.wire import COUNT_KEY, STEER_KEY

Engines = Callable[..., Any]
Checkpoint = Callable[[str], Path]


@pytest.fixture
def engine(tiny: Callable[[str], Any]) -> Any:
    return tiny("Qwen3MoeForCausalLM")


BAD = {
    "unknown model": ("faithfulness", "no ranking for the model"),
    "layer without experts": ('{"activate": {"1": [0]}}', "layer 1 has no routed experts"),
    "layer out of range": ('{"deactivate": {"9": [0]}}', "layer 9 has no routed experts"),
    "expert out of range": ('{"activate": {"0": [8]}}', "no expert 8"),
    "same expert both ways": (
        '{"activate": {"0": [1]}, "deactivate": {"0": [1]}}',
        "activated and deactivated at once",
    ),
    "too many activated": ('{"activate": {"0": [0, 1, 2, 3]}}', "at most 3"),
    "too many deactivated": ('{"deactivate": {"2": [0, 1, 2, 3, 4, 5]}}', "at most 5"),
    "nothing to steer": ('{"activate": {}}', "names no expert"),
    "no text": (["digits"], "must be a string"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_steering_is_named_before_anything_runs(name: str, engine: Any) -> None:
    steer, reason = BAD[name]
    with pytest.raises(VLLMValidationError, match=reason):
        engine.generate(
            {"prompt_token_ids": [3]}, SamplingParams(max_tokens=1, extra_args={STEER_KEY: steer}), use_tqdm=False
        )


@pytest.mark.parametrize(
    ("count", "reason"),
    [
        ('{"group": 1, "ranges": [[0, 5]]}', "after the prompt's 2 tokens"),
        ('{"group": 9, "ranges": [[0, 1]]}', "group 9"),
        ('{"group": 1, "ranges": []}', "ascending"),
        ("nonsense", "counted spans"),
    ],
)
def test_bad_counting_is_named(count: str, reason: str, engine: Any) -> None:
    with pytest.raises(VLLMValidationError, match=reason):
        engine.generate(
            {"prompt_token_ids": [3, 4]}, SamplingParams(max_tokens=1, extra_args={COUNT_KEY: count}), use_tqdm=False
        )


def test_several_answers_to_a_counted_prompt_are_refused(engine: Any) -> None:
    """vLLM makes a request of each; with the prefix cache on they would find some of each other's counted tokens."""
    params = {"max_tokens": 1, "temperature": 1.0, "seed": 1, "n": 3}
    counted = {COUNT_KEY: '{"group": 1, "ranges": [[0, 2]]}'}
    with pytest.raises(VLLMValidationError, match="n=3 answers"):
        engine.generate({"prompt_token_ids": [3, 4]}, SamplingParams(**params, extra_args=counted), use_tqdm=False)
    steered = engine.generate(
        {"prompt_token_ids": [3, 4]},
        SamplingParams(**params, extra_args={STEER_KEY: '{"activate": {"0": [1]}}'}),
        use_tqdm=False,
    )
    assert len(steered[0].outputs) == 3


def test_a_reserved_cache_salt_is_refused(engine: Any) -> None:
    with pytest.raises(VLLMValidationError, match="reserved"):
        engine.generate(
            {"prompt_token_ids": [3], "cache_salt": "steermoe:x"}, SamplingParams(max_tokens=1), use_tqdm=False
        )


def test_steering_switched_off_is_vllms_own_model_and_refuses_steering(
    engines: Engines, checkpoint: Checkpoint
) -> None:
    off = engines(str(checkpoint("OlmoeForCausalLM")), {"enabled": False}, dtype="float32")
    assert (
        len(off.generate({"prompt_token_ids": [3]}, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False))
        == 1
    )
    with pytest.raises(VLLMValidationError, match="switched off"):
        params = SamplingParams(max_tokens=1, extra_args={STEER_KEY: '{"activate": {"0": [1]}}'})
        off.generate({"prompt_token_ids": [3]}, params, use_tqdm=False)


def test_a_plugin_that_vllm_will_not_load_is_noticed(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "something_else")
    with pytest.raises(ConfigurationError, match="VLLM_PLUGINS"):
        start(str(checkpoint("OlmoeForCausalLM")))


def test_misspelt_settings_stop_the_start(checkpoint: Checkpoint, engine: Any) -> None:
    with pytest.raises(ConfigurationError, match="allow_reversed"):
        start(str(checkpoint("OlmoeForCausalLM")), {"allow_reversed": True})
