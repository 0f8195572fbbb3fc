"""Does a generated text give this answer? Rules for the faithfulness sets, whose paper states none."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

_ARTICLES = frozenset(("a", "an", "the"))
_NEGATIONS = frozenset(("not", "isnt", "never", "neither", "wasnt"))
_END_OF_THOUGHT = "</think>"
_LETTER = re.compile(
    r"\W*(?:(?:the\s+)?(?:(?:correct|final|best|right)\s+)?(?:answer|option|choice)\b\s*(?:is\b)?[\s:*(\"']*"
    r"(?P<said>[A-Z])(?![\w'])|[(\[*\"']*(?P<bare>[A-Z])(?:[)\]*\"'.:,]|\s*$|\s*\n))",
    re.IGNORECASE,
)


def final_answer(text: str) -> str:
    """What follows the model's thoughts, if it shows any."""
    return text.rsplit(_END_OF_THOUGHT, maxsplit=1)[-1].strip()


def words(text: str) -> list[str]:
    """Words and numbers without case, accents, punctuation and articles.

    "U.S." is `us`, "1,000" is `1000`, "it's" is `its`; "3.5" stays one number.
    """
    text = unicodedata.normalize("NFKD", text.casefold().replace("_", " "))
    text = "".join(char for char in text if not unicodedata.combining(char) and char not in "'\u2019\u2018`")
    text = re.sub(r"\b(?:\w\.){2,}", lambda match: match[0].replace(".", "") + " ", text)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    found = re.findall(r"\d+(?:\.\d+)+|\w+", text)
    return [word for word in found if word not in _ARTICLES] or found


def gives(text: str, answers: Iterable[str]) -> bool:
    """Whether one of `answers` stands in the text, word for word and not behind a "not"."""
    said = words(final_answer(text))
    return any(_stands_in(said, words(answer)) for answer in answers)


def is_exactly(text: str, answers: Iterable[str]) -> bool:
    """Whether the text is one of `answers`, but for what `words` leaves out."""
    said = words(final_answer(text))
    return any(said == words(answer) != [] for answer in answers)


def choice(text: str, options: Sequence[str]) -> int | None:
    """Which of the options A, B, ... a text chooses: by its letter, else by the one option that it names.

    None if it names none, or several of which none contains the others.
    """
    answer = final_answer(text)
    match = _LETTER.match(answer)
    if match:
        letter = match["said"] or match["bare"]
        index = ord(letter.upper()) - ord("A")
        # "a" is an article; a letter by itself is meant when it is a capital or all there is.
        if index < len(options) and (letter.isupper() or match.end() == len(answer)):
            return index
    said = words(answer)
    named = [i for i, option in enumerate(options) if _stands_in(said, words(option))]
    widest = [i for i in named if all(_stands_in(words(options[i]), words(options[j])) for j in named)]
    return widest[0] if len(widest) == 1 else None


def _stands_in(said: Sequence[str], wanted: Sequence[str]) -> bool:
    if not wanted:
        return False
    starts = range(len(said) - len(wanted) + 1)
    return any(
        list(said[i : i + len(wanted)]) == list(wanted) and not (i and said[i - 1] in _NEGATIONS) for i in starts
    )
