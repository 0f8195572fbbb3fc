"""Texts for the detection benchmark, made of the lab's words."""

from __future__ import annotations

import itertools

from vllm_steermoe_plugin.detection.pairs import ChatMessage, ContrastivePair, PairSet, Side
from vllm_steermoe_plugin.lab import world

NAME = "made for speed"


def chats(number: int, joined: int) -> PairSet:
    """Pairs of chats whose messages are `joined` of the lab's, one after the other; the answers count."""
    drawn = _drawn()
    made = []
    for i in range(number):
        some = [drawn[(i * joined + j * 7) % len(drawn)] for j in range(joined)]
        one = [m for pair in some for m in pair.messages_1 if m["role"] != "system"]
        two = [m for pair in some for m in pair.messages_2 if m["role"] != "system"]
        made.append((one, two))
    return PairSet.from_messages(NAME, made)


def documents(number: int, questions: int, words: int) -> PairSet:
    """Pairs of SQuAD's kind: a question with and without a document of so many words; the question counts.

    Each document has so many questions, one after the other.
    """
    drawn = _drawn()
    text = itertools.cycle(word for pair in drawn for m in pair.messages_1 for word in m["content"].split())
    pairs: list[ContrastivePair] = []
    while len(pairs) < number:
        document = " ".join(itertools.islice(text, words))
        for _ in range(min(questions, number - len(pairs))):
            question = " ".join(itertools.islice(text, 12))
            sides = (f"{document} {question}", question)
            one, two = (Side(messages=(ChatMessage(role="user", content=s),), target=question) for s in sides)
            pairs.append(ContrastivePair(one, two, f"{NAME}, pair {len(pairs)}"))
    return PairSet(NAME, "0" * 64, tuple(pairs))


def _drawn() -> list[world.Pair]:
    return [pair for name in world.BEHAVIOURS for pair in world.pairs(name, "detection", seed=0, n=24)]
