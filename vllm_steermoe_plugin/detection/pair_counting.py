"""Pairs through the engine: each text is a prompt whose counted tokens have a group of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from expert_registry.errors import EngineError
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.detection.engine_client import sent, take_counts
from vllm_steermoe_plugin.detection.pairs import ContrastivePair, PairsError
from vllm_steermoe_plugin.detection.token_spans import TokenSpan, balanced, encode_sides
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans

if TYPE_CHECKING:
    from vllm import LLM

SIDES = 2

Encoded = tuple[int, TokenSpan, TokenSpan]
"""A pair's place in the data, and its two sides."""


def encode_pairs(
    engine: LLM, part: Sequence[ContrastivePair], first: int, *, balance: bool, skip_bad: bool
) -> tuple[list[Encoded], list[str], int]:
    """The pairs that can be counted, why others cannot, and the number of merged tokens.

    Args:
        engine: its tokenizer, chat template and length of context decide.
        part: some pairs.
        first: place of the first one in the data.
        balance: count as many tokens of the longer side as the shorter has.
        skip_bad: leave out what cannot be counted.

    Raises:
        PairsError: a pair cannot be counted, and it is not to be left out.
    """
    tokenizer = engine.get_tokenizer()
    limit = engine.llm_engine.vllm_config.model_config.max_model_len
    sides = [
        (side, f"{pair.origin}, side {which}")
        for pair in part
        for which, side in enumerate((pair.side_1, pair.side_2), start=1)
    ]
    spans = zip(encode_sides(sides, tokenizer), sides, strict=True)
    encoded: list[Encoded] = []
    skipped = []
    merged = 0
    for number, pair in enumerate(part, start=first):
        both = next(spans), next(spans)
        try:
            one, two = (_fitting(span, limit, origin) for span, (_, origin) in both)
            one, two = balanced(one, two) if balance else (one, two)
            if one.ranges == two.ranges and one.token_ids[: one.stop] == two.token_ids[: two.stop]:
                raise PairsError(
                    f"{pair.origin}: nothing in what counts, or before it, differs between the sides, so they are "
                    "routed alike; count what differs or what comes after it"
                )
        except PairsError as error:
            if not skip_bad:
                raise
            skipped.append(str(error))
            continue
        merged += one.merged + two.merged
        encoded.append((number, one, two))
    return encoded, skipped, merged


def _fitting(span: TokenSpan | PairsError, limit: int, origin: str) -> TokenSpan:
    if isinstance(span, PairsError):
        raise span
    if len(span.token_ids) >= limit:
        raise PairsError(
            f"{origin}: {len(span.token_ids)} tokens, but the context holds {limit} with the one that is generated"
        )
    return span


@contextmanager
def sent_pairs(engine: LLM, encoded: Sequence[Encoded]) -> Iterator[None]:
    """Hand pairs to the engine, each text with its own group; see `sent`."""
    texts = _texts(encoded)
    with sent(engine, [(text.token_ids, CountedSpans(group, text.ranges)) for group, text in enumerate(texts, 1)]):
        yield


def take_pairs(engine: LLM, shape: MoEShape, encoded: Sequence[Encoded]) -> tuple[Any, Any]:
    """Wait for the n pairs that were sent: selections int64 `[n, 2, L, E]` and tokens int64 `[n, 2]`.

    Raises:
        EngineError: other tokens were counted than these pairs'.
    """
    texts = _texts(encoded)
    engine.wait_for_completion(use_tqdm=False)
    selections, tokens = take_counts(engine, shape.layers)
    expected = [text.tokens for text in texts]
    if tokens[: len(texts)].tolist() != expected or tokens[len(texts) :].any():
        wrong = next((i for i, number in enumerate(expected) if int(tokens[i]) != number), len(texts))
        raise EngineError(
            f"{int(tokens[wrong])} tokens were counted in group {wrong + 1} instead of "
            f"{expected[wrong] if wrong < len(texts) else 0}; is the engine used by something else?"
        )
    size = (len(encoded), SIDES)
    return selections[: len(texts)].reshape(*size, *selections.shape[1:]), np.reshape(tokens[: len(texts)], size)


def _texts(encoded: Sequence[Encoded]) -> list[TokenSpan]:
    return [span for _, one, two in encoded for span in (one, two)]
