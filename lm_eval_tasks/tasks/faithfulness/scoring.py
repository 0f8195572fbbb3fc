"""From a document and the generated text to the values of the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval_tasks.tasks.matching import choice, final_answer, gives, is_exactly, words

Document = Mapping[str, Any]
Results = Sequence[str]

LENIENT_UNKNOWN = ("unknown", "no answer", "no information", "not", "unclear")
LENIENT_CONFLICT = (
    "conflict",
    "multiple answers",
    "disagreement",
    "inconsistent",
    "contradictory",
    "contradiction",
    "inconsistency",
    "two answers",
    "2 answers",
    "conflicting",
)
"""FaithEval's phrases; each counts wherever its letters stand, also inside a word."""


def chosen(document: Document, results: Results) -> dict[str, float]:
    """`follows`: the right option was chosen; `chose`: some option was."""
    found = choice(results[0], document["options"])
    return {"follows": float(found == document["label"]), "chose": float(found is not None)}


def unknown(document: Document, results: Results) -> dict[str, float]:
    """Strict: the word `unknown`; lenient: one of FaithEval's phrases."""
    return _abstains(results[0], "unknown", LENIENT_UNKNOWN)


def conflict(document: Document, results: Results) -> dict[str, float]:
    """Strict: the word `conflict`; lenient: one of FaithEval's phrases."""
    return _abstains(results[0], "conflict", LENIENT_CONFLICT)


def follows(document: Document, results: Results) -> dict[str, float]:
    """`follows`: the document's answer stands in the text; `exact`: it is the text."""
    return {
        "follows": float(gives(results[0], document["answers"])),
        "exact": float(is_exactly(results[0], document["answers"])),
    }


def follows_not_memory(document: Document, results: Results) -> dict[str, float]:
    """`follows`, and `memory`: the answer is the one from before the edit and not the document's."""
    found = gives(results[0], document["answers"])
    return {"follows": float(found), "memory": float(not found and gives(results[0], document["memory"]))}


def _abstains(text: str, strict: str, lenient: Sequence[str]) -> dict[str, float]:
    said = " ".join(words(final_answer(text)))
    return {
        "strict": float(strict in said.split()),
        "lenient": float(any(phrase in said for phrase in lenient)),
    }
