"""What the engines are given to do: token ids, so that every engine does exactly the same."""

from __future__ import annotations

import random
from dataclasses import dataclass

from vllm_steermoe_plugin.steering.profile import SteeringProfile

_FIRST_TOKEN = 16
"""Token ids below are special in the lab model's tokenizer."""


@dataclass(frozen=True, slots=True)
class Work:
    """Requests that are handed over at once.

    Attributes:
        prompts: token ids of each.
        generated: tokens that each generates, exactly.
    """

    prompts: list[list[int]]
    generated: int

    @property
    def tokens(self) -> int:
        """Tokens that an engine without a prefix cache computes, prompts and generated ones."""
        return sum(len(prompt) for prompt in self.prompts) + len(self.prompts) * self.generated


def prefill(rng: random.Random, vocabulary: int, *, requests: int, length: int) -> Work:
    """Long prompts, one token each."""
    return Work([_tokens(rng, vocabulary, length) for _ in range(requests)], 1)


def decode(rng: random.Random, vocabulary: int, *, requests: int, generated: int) -> Work:
    """Short prompts, many tokens each."""
    return Work([_tokens(rng, vocabulary, 8) for _ in range(requests)], generated)


def questions(
    rng: random.Random, vocabulary: int, *, documents: int, each: int, length: int, question: int, generated: int
) -> Work:
    """`each` questions on each of some documents, mixed, a short answer to each: what retrieval servers do."""
    texts = [_tokens(rng, vocabulary, length) for _ in range(documents)]
    prompts = [text + _tokens(rng, vocabulary, question) for text in texts for _ in range(each)]
    rng.shuffle(prompts)
    return Work(prompts, generated)


def profiles(rng: random.Random, number: int, *, layers: int, experts: int, top_k: int) -> list[str]:
    """Different expert sets that touch every layer: half of top-k activated, as many deactivated."""
    made = []
    for _ in range(number):
        drawn = {layer: rng.sample(range(experts), 2 * (top_k // 2)) for layer in range(layers)}
        up = frozenset((layer, expert) for layer, some in drawn.items() for expert in some[: top_k // 2])
        down = frozenset((layer, expert) for layer, some in drawn.items() for expert in some[top_k // 2 :])
        made.append(SteeringProfile(up, down).to_json())
    return made


def _tokens(rng: random.Random, vocabulary: int, number: int) -> list[int]:
    return [rng.randrange(_FIRST_TOKEN, vocabulary) for _ in range(number)]
