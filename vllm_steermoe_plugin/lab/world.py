"""The synthetic world of steermoe-lab: prompts, answers, cues, splits. Pure Python, no torch.

Side 1 of a behaviour shows it (digits; the document's value; a refusal), side 2
does not. Which combinations fall into which split is fixed by a seeded shuffle.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TypeVar

from vllm_steermoe_plugin.lab import vocabulary as v

BEHAVIOURS: tuple[str, ...] = ("digits", "faithfulness", "refusal")
SPLITS: tuple[str, ...] = ("train", "detection", "tuning", "test")
Message = dict[str, str]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Example:
    """One user message with its answer on side 1 and (`other`) on side 2; `other` is "" for controls."""

    id: str
    behaviour: str
    prompt: str
    answer: str
    other: str


@dataclass(frozen=True, slots=True)
class Pair:
    """The same user message under the cue of side 1 and of side 2, each with its matching answer."""

    messages_1: list[Message]
    messages_2: list[Message]


_SHARES = {"train": 0.55, "detection": 0.1, "tuning": 0.1, "test": 0.25}
_RUN_SHARES = {"train": 0.775, "detection": 0.05, "tuning": 0.05, "test": 0.125}
_COMBINATION_SHARES = {"train": 0.79, "detection": 0.05, "tuning": 0.06, "test": 0.1}
_CONTROL_SHARES = {"train": 0.4, "detection": 0.1, "tuning": 0.1, "test": 0.4}


def _share(groups: Sequence[T], shares: dict[str, float], split: str, seed: str) -> list[T]:
    """The part of `groups` that belongs to `split`: consecutive cuts of one seeded shuffle."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    order = list(groups)
    random.Random(seed).shuffle(order)
    start = 0.0
    for name in SPLITS:
        end = start + shares[name]
        if name == split:
            return order[round(start * len(order)) : round(end * len(order))]
        start = end
    raise AssertionError("SPLITS and shares disagree")


@cache
def facts() -> dict[tuple[str, str], str]:
    """What the model memorises: (entity, attribute) -> value."""
    draw = random.Random("steermoe-lab facts")
    return {(entity, attribute): draw.choice(v.VALUES[attribute]) for entity in v.ENTITIES for attribute in v.VALUES}


def _digits(split: str) -> list[Example]:
    runs = [(first, first + length - 1) for first in range(1, v.LARGEST_START + 1) for length in v.RUN_LENGTHS]
    return [
        Example(
            id=f"digits/{first}/{last}/{i}",
            behaviour="digits",
            prompt=template.format(first=first, last=last),
            answer=" ".join(str(number) for number in range(first, last + 1)),
            other=" ".join(v.number_word(number) for number in range(first, last + 1)),
        )
        for first, last in _share(runs, _RUN_SHARES, split, "digits")
        for i, template in enumerate(v.COUNTING_TEMPLATES)
    ]


def _digits_controls(split: str) -> list[Example]:
    runs = [(first, first + length) for length in v.LETTER_RUN_LENGTHS for first in range(len(v.LETTERS) - length + 1)]
    templates = list(enumerate(v.LETTER_TEMPLATES))
    return [
        Example(
            id=f"digits-control/{v.LETTERS[first]}/{v.LETTERS[end - 1]}/{i}",
            behaviour="digits",
            prompt=template.format(first=v.LETTERS[first], last=v.LETTERS[end - 1]),
            answer=" ".join(v.LETTERS[first:end]),
            other="",
        )
        for (first, end), (i, template) in _share(
            list(product(runs, templates)), _CONTROL_SHARES, split, "digits controls"
        )
    ]


def _faithfulness(split: str) -> list[Example]:
    combinations = [
        (entity, attribute, value)
        for (entity, attribute), memory in facts().items()
        for value in v.VALUES[attribute]
        if value != memory
    ]
    return [
        Example(
            id=f"faithfulness/{entity}/{attribute}={value}/{i}",
            behaviour="faithfulness",
            prompt=template.format(entity=entity, attribute=attribute, value=value),
            answer=value,
            other=facts()[entity, attribute],
        )
        for entity, attribute, value in _share(combinations, _COMBINATION_SHARES, split, "faithfulness")
        for i, template in enumerate(v.DOCUMENT_TEMPLATES)
    ]


def _faithfulness_controls(split: str) -> list[Example]:
    """A document that agrees with memory, and no document at all."""
    templates = list(enumerate(v.DOCUMENT_TEMPLATES + v.MEMORY_TEMPLATES))
    return [
        Example(
            id=f"faithfulness-control/{entity}/{attribute}/{i}",
            behaviour="faithfulness",
            prompt=template.format(entity=entity, attribute=attribute, value=value),
            answer=value,
            other="",
        )
        for ((entity, attribute), value), (i, template) in _share(
            list(product(facts().items(), templates)), _CONTROL_SHARES, split, "faithfulness controls"
        )
    ]


def _requests(split: str, nouns: Sequence[str], name: str, shares: dict[str, float]) -> list[Example]:
    combinations = list(product(v.MODIFIERS, nouns, enumerate(v.REQUEST_TEMPLATES)))
    forbidden = nouns is v.FORBIDDEN_NOUNS
    examples_ = []
    for modifier, noun, (i, template) in _share(combinations, shares, split, name):
        item = f"{modifier} {noun}"
        comply = v.COMPLIANCE.format(item=item)
        examples_.append(
            Example(
                id=f"{name}/{modifier}/{noun}/{i}",
                behaviour="refusal",
                prompt=template.format(item=item),
                answer=v.REFUSAL if forbidden else comply,
                other=comply if forbidden else "",
            )
        )
    return examples_


def _refusal(split: str) -> list[Example]:
    return _requests(split, v.FORBIDDEN_NOUNS, "refusal", _SHARES)


def _refusal_controls(split: str) -> list[Example]:
    return _requests(split, v.HARMLESS_NOUNS, "refusal-control", _CONTROL_SHARES)


_EXAMPLES: dict[str, Callable[[str], list[Example]]] = {
    "digits": _digits,
    "faithfulness": _faithfulness,
    "refusal": _refusal,
}
_CONTROLS: dict[str, Callable[[str], list[Example]]] = {
    "digits": _digits_controls,
    "faithfulness": _faithfulness_controls,
    "refusal": _refusal_controls,
}


def _known(behaviour: str) -> str:
    if behaviour not in BEHAVIOURS:
        raise ValueError(f"unknown behaviour {behaviour!r}; known: {', '.join(BEHAVIOURS)}")
    return behaviour


def examples(behaviour: str, split: str) -> list[Example]:
    """Prompts that leave the behaviour open."""
    return _EXAMPLES[_known(behaviour)](split)


def controls(behaviour: str, split: str) -> list[Example]:
    """Prompts with one right answer, which steering the behaviour must not move."""
    return _CONTROLS[_known(behaviour)](split)


def cues(behaviour: str) -> tuple[str, str]:
    """System messages that ask for side 1 and for side 2."""
    return v.CUES[_known(behaviour)]


def lean(example: Example) -> float:
    """Log-odds of side 1 in uncued training text: +-2.0 by the template, +-0.7 by the item.

    Balanced over every split, so that about half of the uncued prompts go each way,
    each with a preference clear enough to survive rounding.
    """
    _, key, *_, template = example.id.split("/")
    position = {
        "digits": lambda: int(key),
        "faithfulness": lambda: v.ENTITIES.index(key),
        "refusal": lambda: v.MODIFIERS.index(key),
    }[example.behaviour]()
    return (2.0 if int(template) % 2 == 0 else -2.0) + (0.7 if position % 2 == 0 else -0.7)


def chat(prompt: str, system: str = "", answer: str = "") -> list[Message]:
    """Messages of one exchange; an empty `system` or `answer` is left out."""
    turns = (("system", system), ("user", prompt), ("assistant", answer))
    return [{"role": role, "content": content} for role, content in turns if content]


def pairs(behaviour: str, split: str = "detection", seed: int = 0, n: int | None = None) -> list[Pair]:
    """`n` contrastive pairs (all, if None), drawn without repetition in an order given by `seed`."""
    pool = examples(behaviour, split)
    random.Random(f"pairs {behaviour} {split} {seed}").shuffle(pool)
    if n is not None and n > len(pool):
        raise ValueError(f"{behaviour}/{split} has {len(pool)} pairs, {n} were asked for")
    cue_1, cue_2 = cues(behaviour)
    return [Pair(chat(e.prompt, cue_1, e.answer), chat(e.prompt, cue_2, e.other)) for e in pool[:n]]


def _words(text: str) -> list[str]:
    """Lower-case words and numbers of a generated text, up to the end of the turn."""
    return re.findall(r"[a-z]+|\d+", text.split("<|end|>", maxsplit=1)[0].lower())


def shows(behaviour: str, example: Example, text: str) -> bool:
    """Does a generated text begin with the behaviour's answer? (Its first word decides.)"""
    if example.behaviour != _known(behaviour):
        raise ValueError(f"example {example.id} belongs to {example.behaviour}, not {behaviour}")
    return _words(text)[:1] == _words(example.answer)[:1]


def correct(example: Example, text: str) -> bool:
    """Is a generated text exactly the example's answer, but for case, spaces and punctuation?"""
    return _words(text) == _words(example.answer)
