"""vLLM's beam search: steered exactly by an operator's default, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams

from tests.support.greedy import generate, prompt_logprobs, scoring
from tests.support.random_steering import as_text, random_rules
from vllm_steermoe_plugin.frontend.attached import front_end_of
from vllm_steermoe_plugin.models import lab_checkpoint
from vllm_steermoe_plugin.models.checkpoints import shape_in
from vllm_steermoe_plugin.steering.wire import STEER_KEY

Engines = Callable[..., Any]
PROMPTS = [{"prompt_token_ids": [5 + i, *range(10, 30)]} for i in range(3)]
BEAMS = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)


def steering() -> str:
    return as_text(random_rules(shape_in(lab_checkpoint.MODEL_DIR), 1))


@pytest.fixture
def plain(lab: Any) -> Any:
    return lab


@pytest.fixture
def by_default(engines: Engines) -> Any:
    """An engine that steers every request, with vLLM's prefix cache on, and lets none change that."""
    settings = {"default": steering(), "allow_override": False}
    return engines(lab_checkpoint.NAME, settings, dtype="float32", enable_prefix_caching=True, block_size=32)


def beams(engine: Any) -> list[list[Any]]:
    return [output.sequences for output in engine.beam_search(PROMPTS, BEAMS)]


def score(engine: Any, tokens: list[int], prompt_length: int, steer: str | None) -> float:
    """Sum of the log-probabilities of the tokens after the prompt."""
    (output,) = generate(engine, [tokens], [scoring(steer)])
    return float(prompt_logprobs(output, prompt_length).sum())


def test_every_beam_of_a_steered_engine_is_scored_as_steered(plain: Any, by_default: Any) -> None:
    text = steering()
    steered, unsteered = beams(by_default), beams(plain)
    assert [[b.tokens for b in s] for s in steered] != [[b.tokens for b in s] for s in unsteered]
    for found, steer in ((steered, text), (unsteered, None)):
        for sequences, asked in zip(found, PROMPTS, strict=True):
            length = len(asked["prompt_token_ids"])
            for beam in sequences:
                assert len(beam.tokens) == length + BEAMS.max_tokens
                # Scored at once by another engine that is asked for the same steering.
                np.testing.assert_allclose(beam.cum_logprob, score(plain, beam.tokens, length, steer), atol=2e-3)


def test_one_beam_is_greedy_decoding(plain: Any, by_default: Any) -> None:
    one = by_default.beam_search(PROMPTS, BeamSearchParams(beam_width=1, max_tokens=6, ignore_eos=True))
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, extra_args={STEER_KEY: steering()})
    greedy = plain.generate(PROMPTS, params, use_tqdm=False)
    for beam, output, asked in zip(one, greedy, PROMPTS, strict=True):
        assert beam.sequences[0].tokens[len(asked["prompt_token_ids"]) :] == list(output.outputs[0].token_ids)


def test_what_the_caller_hands_in_stays_as_it_was(by_default: Any) -> None:
    # vLLM's beam search reuses one object for all steps; a profile left in it would come back as the request's own.
    params = SamplingParams(max_tokens=1, skip_clone=True)
    for _ in range(2):
        by_default.generate(PROMPTS[0], params, use_tqdm=False)
        assert params.extra_args is None


@pytest.mark.parametrize("phase", ["prompt", "generation"])
def test_a_default_by_phase_refuses_beam_search(phase: str, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    front_end = front_end_of(plain.llm_engine.input_processor)
    admit, text = front_end.admit, f'{steering()[:-1]}, "phase": "{phase}"}}'
    # As with this text as the operator's default.
    monkeypatch.setattr(front_end, "admit", lambda extra_args, _: admit(extra_args or {STEER_KEY: text}))
    with pytest.raises(VLLMValidationError, match="beam search"):
        plain.beam_search(PROMPTS, BEAMS)
    assert not plain.llm_engine.has_unfinished_requests()
    monkeypatch.undo()
    assert beams(plain)
