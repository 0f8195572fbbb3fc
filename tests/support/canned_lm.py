"""A language model for lm-eval that answers what a function says: no weights, no engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import LM


class CannedLM(LM):
    """Text by `answer(prompt)`; what `use_steering` sets is in effect, and shows in `get_model_info`."""

    def __init__(self, answer: Callable[[str, str], str]) -> None:
        super().__init__()
        self.answer = answer
        self.steering = "none"
        self.prompts: list[str] = []
        self.batches: list[tuple[int, list[str]]] = []

    def use_steering(self, steer: str | None = None, **_: Any) -> None:
        self.steering = steer or "none"

    def get_model_info(self) -> dict[str, Any]:
        on = self.steering != "none"
        profile = self.steering if self.steering.startswith("{") else f"profile of {self.steering}" if on else None
        return {
            "steermoe": {
                "model": "canned",
                "request": self.steering,
                "profile": profile,
                "digest": f"digest of {self.steering}" if on else None,
                "activated": 2 if on else 0,
                "deactivated": 1 if on else 0,
                "biased": 0,
                "sources": [],
                "versions": {"vllm": "0"},
                "requests": len(self.prompts),
                "steered_requests": len(self.prompts) if on else 0,
            }
        }

    def next_tokens(self, prompts: Sequence[str], texts: Sequence[str]) -> list[list[dict[int, float]]]:
        """Token 0 or 1; the larger the strength that is asked for, the rarer is token 0."""
        self.batches.append((len(prompts), list(texts)))
        found = []
        for text in texts:
            strength = abs(float(text.partition("strength=")[2].partition(":")[0] or 0))
            rare = 0.5 / (1 + strength)
            found.append([{0: math.log(rare), 1: math.log(1 - rare)} for _ in prompts])
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self.prompts += [request.args[0] for request in requests]
        return [self.answer(self.steering, request.args[0]) for request in requests]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(-float(len(request.args[1])), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return [-1.0 for _ in requests]
