"""Greedy answers of an engine to a batch, each request steered in its own way."""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm import SamplingParams

from vllm_steermoe_plugin.steering.wire import STEER_KEY


def run(
    engine: Any, requests: list[tuple[list[int], str | None]], max_tokens: int = 6
) -> list[tuple[list[int], np.ndarray]]:
    """Generated tokens and their log-probabilities, for a batch."""
    params = [
        SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            logprobs=1,
            ignore_eos=True,
            detokenize=False,
            extra_args={STEER_KEY: steer} if steer else None,
        )
        for _, steer in requests
    ]
    outputs = engine.generate([{"prompt_token_ids": ids} for ids, _ in requests], params, use_tqdm=False)
    return [
        (
            list(o.outputs[0].token_ids),
            np.array(
                [entry[t].logprob for entry, t in zip(o.outputs[0].logprobs, o.outputs[0].token_ids, strict=True)]
            ),
        )
        for o in outputs
    ]
