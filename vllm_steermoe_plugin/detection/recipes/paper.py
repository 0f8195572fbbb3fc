"""The contrastive pairs of arXiv 2509.09660 on their public data sets, for any chat model.

Where we depart from the paper, the behaviour's note says so: refusals are varied instead of twelve sentences,
and the sides of `safety` are balanced by tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from expert_registry import Recommended
from vllm_steermoe_plugin.detection.datasets import DataSource
from vllm_steermoe_plugin.detection.pairs import PairSet
from vllm_steermoe_plugin.detection.recipes.recipe import Behaviour, Line, PairSampling, Recipe
from vllm_steermoe_plugin.detection.recipes.refusal_texts import refusal
from vllm_steermoe_plugin.detection.rows import DataError, text_of

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
_TO_19 = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_UNITS = _TO_19.split()
_WORDS = _UNITS + [
    word for ten in ("twenty", "thirty", "forty") for word in (ten, *(f"{ten}-{unit}" for unit in _UNITS[:9]))
]
"""The numbers from 1 to 49."""


def faithfulness(model: str, sampling: PairSampling) -> Recipe:
    """The same question with (positive side) and without its document; the question's tokens count on both sides.

    Questions about one document are one cluster.
    """

    documents: dict[str, int] = {}

    def line(place: str, row: Mapping[str, Any]) -> Line:
        context, question = text_of(row, "context", place), text_of(row, "question", place)
        without = f"Question: {question}"
        return {
            "messages_1": [{"role": "user", "content": f"Document: {context} {without}"}],
            "messages_2": [{"role": "user", "content": without}],
            # The question comes last, so its last occurrence is the one that counts on both sides.
            "target_1": question,
            "target_2": question,
            "cluster": documents.setdefault(context, len(documents)),
        }

    return Recipe(
        _drawn(SQUAD, line, sampling),
        Behaviour(
            "faithfulness",
            ("has the document that answers the question", "has only the question"),
            False,
            _recommended("faithfulness", model),
            SQUAD.license,
            "The question's tokens count, on both sides. Questions about one document are one cluster.",
        ),
    )


def safety(model: str, sampling: PairSampling) -> Recipe:
    """An unsafe prompt with a refusal (positive side) and with the data set's unsafe answer; each prompt once."""

    chance = random.Random(sampling.seed)
    seen = set()

    def line(place: str, row: Mapping[str, Any]) -> Line | None:
        if not isinstance(row["is_safe"], bool):
            raise DataError(f"{place}: is_safe must be true or false, got {row['is_safe']!r:.60}")
        if row["is_safe"] or not str(row["response"] or "").strip():
            return None
        prompt, response = text_of(row, "prompt", place), text_of(row, "response", place)
        if prompt in seen:
            return None
        seen.add(prompt)
        asked = {"role": "user", "content": prompt}
        return {
            "messages_1": [asked, {"role": "assistant", "content": refusal(chance)}],
            "messages_2": [asked, {"role": "assistant", "content": response}],
        }

    return Recipe(
        _drawn(BEAVERTAILS, line, sampling),
        Behaviour(
            "safety",
            ("refuses an unsafe request", "answers an unsafe request"),
            True,
            _recommended("safety", model),
            BEAVERTAILS.license,
            "The answer's tokens count. Refusals are combined from parts, and each pair's longer answer counts "
            "only as far as the shorter one goes; the paper repeats twelve refusals and counts all.",
        ),
        balance=True,
    )


def digits(model: str, sampling: PairSampling) -> Recipe:
    """The same request to count, answered in digits (positive side) and in words."""
    if sampling.data_file is not None:
        raise DataError("recipe 'digits' makes its pairs itself and takes no --data-file")

    def lines() -> Iterator[tuple[str, Line]]:
        for number, (last, template, separator) in enumerate(product(_TARGETS, _COUNTING, _SEPARATORS)):
            asked = {"role": "user", "content": template.format(word=_WORDS[last - 1])}
            written = ([str(n) for n in range(1, last + 1)], _WORDS[:last])
            one, two = (separator.join(numbers) for numbers in written)
            yield (
                f"recipe 'digits', pair {number}",
                {
                    "messages_1": [asked, {"role": "assistant", "content": one}],
                    "messages_2": [asked, {"role": "assistant", "content": two}],
                },
            )

    pairs = PairSet.from_rows(f"digits, seed {sampling.seed}", _shuffled(list(lines()), sampling.seed)).first(
        sampling.limit
    )
    sides = ("counts in digits", "counts in words")
    note = (
        "Each number is asked for in each wording and answered with each separator, so the pairs are crossed and in no "
        "clusters: intervals and tests, which take them as independent, are too sure."
    )
    return Recipe(pairs, Behaviour("digits", sides, False, _recommended("digits", model), "Apache-2.0", note))


PAPER_RECIPES: dict[str, Callable[[str, PairSampling], Recipe]] = {
    "digits": digits,
    "faithfulness": faithfulness,
    "safety": safety,
}


def _recommended(behaviour: str, model: str) -> Recommended:
    activate, deactivate = _NUMBERS.get(behaviour, {}).get(model, _ELSEWHERE)
    return Recommended(activate=activate, deactivate=deactivate)


def _drawn(
    source: DataSource, line: Callable[[str, Mapping[str, Any]], Line | None], sampling: PairSampling
) -> PairSet:
    """Pairs of the rows of which `line` makes one."""
    file = sampling.data_file
    whence = f"{source.id}, split {source.split}" if file is None else f"{file.name}, columns of {source.id}"
    found: list[tuple[str, Line]] = []
    skipped = []
    for place, row in source.rows(file):
        try:
            made = line(place, row)
        except DataError as error:
            if not sampling.skip_bad:
                raise
            skipped.append(str(error))
            continue
        if made is not None:
            found.append((place, made))
    if not found:
        raise DataError(f"{whence} holds no row that makes a pair" + (f"; the first: {skipped[0]}" if skipped else ""))
    shuffled = _shuffled(found, sampling.seed)
    pairs = PairSet.from_rows(f"{whence}, seed {sampling.seed}", shuffled, skip_bad=sampling.skip_bad)
    return replace(pairs, skipped=(*skipped, *pairs.skipped)).first(sampling.limit)


def _shuffled(lines: list[tuple[str, Line]], seed: int) -> list[tuple[str, Line]]:
    """In an order that the seed draws, so that the first n of them, or a random half, are like all of them."""
    random.Random(seed).shuffle(lines)
    return lines
