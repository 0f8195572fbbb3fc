"""Greedy requests to an engine, each steered and counted in its own way, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm import SamplingParams

from vllm_steermoe_plugin.steering.wire import COUNT_KEY, STEER_KEY


def asking(steer: str | None = None, count: str | None = None, **options: Any) -> SamplingParams:
    """For tokens without text, unless `options` say otherwise."""
    extra = {key: value for key, value in ((STEER_KEY, steer), (COUNT_KEY, count)) if value}
    return SamplingParams(**{"temperature": 0.0, "detokenize": False, "extra_args": extra or None, **options})


def scoring(steer: str | None = None, count: str | None = None) -> SamplingParams:
    """For the log-probabilities of the prompt."""
    return asking(steer, count, max_tokens=1, prompt_logprobs=0)


def generate(engine: Any, prompts: Sequence[list[int]], params: list[SamplingParams]) -> list[Any]:
    """vLLM's outputs for a batch of token ids."""
    found: list[Any] = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return found


def prompt_logprobs(output: Any, start: int = 1) -> np.ndarray:
    """Of the prompt's tokens from `start` on."""
    pairs = zip(output.prompt_logprobs[start:], output.prompt_token_ids[start:], strict=True)
    return np.array([entry[token].logprob for entry, token in pairs])


def answer(output: Any) -> tuple[list[int], np.ndarray]:
    """Generated tokens and their log-probabilities."""
    first = output.outputs[0]
    pairs = zip(first.logprobs, first.token_ids, strict=True)
    return list(first.token_ids), np.array([entry[token].logprob for entry, token in pairs])


def run(
    engine: Any, requests: list[tuple[list[int], str | None]], max_tokens: int = 6
) -> list[tuple[list[int], np.ndarray]]:
    """The answers to a batch of prompts and their steerings."""
    params = [asking(steer, max_tokens=max_tokens, logprobs=1, ignore_eos=True) for _, steer in requests]
    return [answer(output) for output in generate(engine, [ids for ids, _ in requests], params)]
