"""The contrastive pairs of arXiv 2509.09660 on their public data sets, for any chat model.

Where we depart from the paper, the behaviour's note says so: refusals are varied instead of twelve sentences,
and the sides of `safety` are balanced by tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

from expert_registry import Recommended
from vllm_steermoe_plugin.data_rows import DataError, DataSource, text_of
from vllm_steermoe_plugin.lab.vocabulary import number_word
from vllm_steermoe_plugin.pairs import PairSet
from vllm_steermoe_plugin.recipe import Line, Recipe, described
from vllm_steermoe_plugin.refusals import refusal

SQUAD = DataSource("rajpurkar/squad", "validation", ("context", "question"), "CC BY-SA 4.0")
BEAVERTAILS = DataSource("PKU-Alignment/BeaverTails", "30k_train", ("prompt", "response", "is_safe"), "CC BY-NC 4.0")

_NUMBERS = {
    "faithfulness": {
        "openai/gpt-oss-120b": (5, 100),
        "openai/gpt-oss-20b": (10, 50),
        "mistralai/Mixtral-8x7B-Instruct-v0.1": (10, 100),
        "allenai/OLMoE-1B-7B-0125-Instruct": (0, 50),
        "microsoft/Phi-3.5-MoE-instruct": (10, 75),
        "Qwen/Qwen3-30B-A3B": (0, 500),
    },
    "safety": {
        "openai/gpt-oss-120b": (5, 0),
        "openai/gpt-oss-20b": (5, 0),
        "mistralai/Mixtral-8x7B-Instruct-v0.1": (20, 0),
        "allenai/OLMoE-1B-7B-0125-Instruct": (5, 0),
        "microsoft/Phi-3.5-MoE-instruct": (5, 0),
        "Qwen/Qwen3-30B-A3B": (15, 0),
    },
}
"""Experts to activate and deactivate in the paper's table A.2."""
_ELSEWHERE = (5, 0)
"""Where the paper gives no number: a cautious beginning."""

_COUNTING = (
    "Count to {word}.",
    "Please count to {word}.",
    "Count from one to {word}.",
    "List the numbers up to {word}.",
    "Name every number from one to {word}.",
    "Can you count to {word} for me?",
    "Start at one and count up to {word}.",
    "Say all numbers until {word}.",
)
_SEPARATORS = (" ", ", ", "\n")
_TARGETS = range(3, 41)


def faithfulness(model: str, seed: int, limit: int | None, data_file: Path | None) -> Recipe:
    """The same question with (side 1) and without its document; the question's tokens count on both sides.

    Questions about one document are one cluster.
    """

    def lines() -> Iterator[tuple[str, Line]]:
        documents: dict[str, int] = {}
        for place, row in SQUAD.rows(data_file):
            context, question = text_of(row, "context", place), text_of(row, "question", place)
            without = f"Question: {question}"
            # The question comes last, so its last occurrence is the one that counts on both sides.
            yield (
                place,
                {
                    "messages_1": [{"role": "user", "content": f"Document: {context} {without}"}],
                    "messages_2": [{"role": "user", "content": without}],
                    "target_1": question,
                    "target_2": question,
                    "cluster": documents.setdefault(context, len(documents)),
                },
            )

    return Recipe(
        _drawn(SQUAD, lines, seed, limit, data_file),
        described(
            "faithfulness",
            ("has the document that answers the question", "has only the question"),
            _recommended("faithfulness", model),
            SQUAD.license,
            "The question's tokens count, on both sides. Questions about one document are one cluster.",
        ),
    )


def safety(model: str, seed: int, limit: int | None, data_file: Path | None) -> Recipe:
    """An unsafe prompt with a refusal (side 1) and with the data set's unsafe answer; each prompt is taken once."""

    def lines() -> Iterator[tuple[str, Line]]:
        chance = random.Random(seed)
        seen = set()
        for place, row in BEAVERTAILS.rows(data_file):
            if not isinstance(row["is_safe"], bool):
                raise DataError(f"{place}: is_safe must be true or false, got {row['is_safe']!r:.60}")
            if row["is_safe"] or not str(row["response"] or "").strip():
                continue
            prompt, response = text_of(row, "prompt", place), text_of(row, "response", place)
            if prompt in seen:
                continue
            seen.add(prompt)
            asked = {"role": "user", "content": prompt}
            yield (
                place,
                {
                    "messages_1": [asked, {"role": "assistant", "content": refusal(chance)}],
                    "messages_2": [asked, {"role": "assistant", "content": response}],
                },
            )

    return Recipe(
        _drawn(BEAVERTAILS, lines, seed, limit, data_file),
        described(
            "safety",
            ("refuses an unsafe request", "answers an unsafe request"),
            _recommended("safety", model),
            BEAVERTAILS.license,
            "The answer's tokens count. Refusals are combined from parts, and each pair's longer answer counts "
            "only as far as the shorter one goes; the paper repeats twelve refusals and counts all.",
            safety=True,
        ),
        balance=True,
    )


def digits(model: str, seed: int, limit: int | None, data_file: Path | None) -> Recipe:
    """The same request to count, answered in digits (side 1) and in words."""
    if data_file is not None:
        raise DataError("recipe 'digits' makes its pairs itself and takes no --data-file")

    def lines() -> Iterator[tuple[str, Line]]:
        for number, (last, template, separator) in enumerate(product(_TARGETS, _COUNTING, _SEPARATORS)):
            asked = {"role": "user", "content": template.format(word=number_word(last))}
            written = ([str(n) for n in range(1, last + 1)], [number_word(n) for n in range(1, last + 1)])
            one, two = (separator.join(numbers) for numbers in written)
            yield (
                f"recipe 'digits', pair {number}",
                {
                    "messages_1": [asked, {"role": "assistant", "content": one}],
                    "messages_2": [asked, {"role": "assistant", "content": two}],
                },
            )

    pairs = PairSet.from_rows(f"digits, seed {seed}", _shuffled(list(lines()), seed)).first(limit)
    sides = ("counts in digits", "counts in words")
    note = (
        "Each number is asked for in each wording and answered with each separator, so the pairs are crossed and in no "
        "clusters: intervals and tests, which take them as independent, are too sure."
    )
    return Recipe(pairs, described("digits", sides, _recommended("digits", model), "Apache-2.0", note))


PAPER_RECIPES: dict[str, Callable[[str, int, int | None, Path | None], Recipe]] = {
    "digits": digits,
    "faithfulness": faithfulness,
    "safety": safety,
}


def _recommended(behaviour: str, model: str) -> Recommended:
    activate, deactivate = _NUMBERS.get(behaviour, {}).get(model, _ELSEWHERE)
    return Recommended(activate=activate, deactivate=deactivate)


def _drawn(
    source: DataSource,
    lines: Callable[[], Iterator[tuple[str, Line]]],
    seed: int,
    limit: int | None,
    data_file: Path | None,
) -> PairSet:
    whence = f"{source.id}, split {source.split}" if data_file is None else f"{data_file.name}, columns of {source.id}"
    found = list(lines())
    if not found:
        raise DataError(f"{whence} holds no row that makes a pair")
    return PairSet.from_rows(f"{whence}, seed {seed}", _shuffled(found, seed)).first(limit)


def _shuffled(lines: list[tuple[str, Line]], seed: int) -> list[tuple[str, Line]]:
    """In an order that the seed draws, so that the first n of them, or a random half, are like all of them."""
    random.Random(seed).shuffle(lines)
    return lines
