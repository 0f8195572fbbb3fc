"""Contrastive pairs: two texts that differ in a behaviour, and which tokens of each are counted.

A file of pairs is JSON lines, or of another kind that `rows` reads. Each line has `messages_1` and `messages_2` (chat
messages) or `text_1` and `text_2`, and may have `target_1` and `target_2`: the part of the text that
counts (its last occurrence). Instead of a target, `count_1` and `count_2` may say what counts:
`"all"`; a role's name, for every message of that role; `[start, stop]`, characters of the text;
or `[message, start, stop]`, characters of a message (numbered from 0). With neither, the last
assistant message counts, or, in plain text, everything.

Pairs that share something that others do not have (several questions about one document) are no independent evidence:
the same `cluster` (a string or a whole number) says so. A pair without one is its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from expert_registry.errors import SteerMoEError
from vllm_steermoe_plugin.detection.rows import DataError, parse_json, read_data, scan_rows

MAX_TEXT = 1 << 20
"""Characters of one text or message."""

ALL = "all"
DEFAULT_RULE = "the target string or other part that a pair names, else the last assistant message, else the whole text"
"""What counts, in words, where nothing else is said."""
Count = str | tuple[int, int] | tuple[int, int, int]


class PairsError(SteerMoEError):
    """A file of pairs, or a pair in it, cannot be used; the message names file and line."""

    code = "STEERMOE-E401"


_Text = Annotated[str, Field(max_length=MAX_TEXT)]


class ChatMessage(BaseModel):
    """One chat message."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: _Text


_Position = Annotated[int, Field(ge=0, le=MAX_TEXT, strict=True)]
_Count = (
    Annotated[str, Field(min_length=1, max_length=64)]
    | tuple[_Position, _Position]
    | tuple[_Position, _Position, _Position]
)


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    messages_1: tuple[ChatMessage, ...] | None = None
    messages_2: tuple[ChatMessage, ...] | None = None
    text_1: _Text | None = None
    text_2: _Text | None = None
    target_1: Annotated[str, Field(min_length=1)] | None = None
    target_2: Annotated[str, Field(min_length=1)] | None = None
    count_1: _Count | None = None
    count_2: _Count | None = None
    cluster: Annotated[int, Field(strict=True)] | Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _both_sides_alike(self) -> Self:
        chat = (self.messages_1 is not None, self.messages_2 is not None)
        text = (self.text_1 is not None, self.text_2 is not None)
        if (chat, text) not in (((True, True), (False, False)), ((False, False), (True, True))):
            raise ValueError("a pair has messages_1 and messages_2, or text_1 and text_2")
        for side, target, count in ((1, self.target_1, self.count_1), (2, self.target_2, self.count_2)):
            if target is not None and count is not None:
                raise ValueError(f"target_{side} and count_{side} both say what counts; give one")
            if isinstance(count, tuple) and len(count) != (2 if text[0] else 3):
                raise ValueError(
                    f"count_{side} is [start, stop] of a text or [message, start, stop] of a chat, got {list(count)}"
                )
        return self


COLUMNS = tuple(_Line.model_fields)
"""What a line may have."""


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a pair: `messages` or `text`, and the target string or other part that counts, if named."""

    messages: tuple[ChatMessage, ...] | None = None
    text: str | None = None
    target: str | None = None
    count: Count | None = None


@dataclass(frozen=True, slots=True)
class ContrastivePair:
    """The positive side (1) shows the behaviour, the negative (2) does not. `origin` names file and line in errors.

    Pairs with the same `cluster` (7 and "7" are the same) share something; None for a pair that shares nothing.
    """

    side_1: Side
    side_2: Side
    origin: str
    cluster: str | None = None


@dataclass(frozen=True, slots=True)
class PairSet:
    """Pairs with the name, the hash and the rule of what counts that stand in a ranking card.

    `skipped` says of each line that was left out why; there are none unless that was asked for.
    """

    name: str
    sha256: str
    pairs: tuple[ContrastivePair, ...]
    skipped: tuple[str, ...] = ()
    rule: str = DEFAULT_RULE

    @classmethod
    def from_messages(
        cls, name: str, pairs: Iterable[tuple[Sequence[dict[str, str]], Sequence[dict[str, str]]]]
    ) -> PairSet:
        """Pairs of chats made in Python; they hash as the file that they would be."""
        lines = ({"messages_1": one, "messages_2": two} for one, two in pairs)
        return cls.from_rows(name, ((f"{name}, line {number}", line) for number, line in enumerate(lines, start=1)))

    @classmethod
    def from_rows(
        cls,
        name: str,
        rows: Iterable[tuple[str, Mapping[str, object]]],
        *,
        count: str | None = None,
        skip_bad: bool = False,
    ) -> PairSet:
        """Pairs as parsed lines, each with its place for errors; they hash as the file that they would be.

        `count` and `skip_bad` as for `read_pairs`.

        Raises:
            PairsError: a line is not as the module says.
        """
        written = [(place, _written(row)) for place, row in rows]
        digest = hashlib.sha256(b"\n".join(line for _, line in written)).hexdigest()
        return _gathered(name, digest, ((place, parse_json(line, place)) for place, line in written), count, skip_bad)

    def first(self, number: int | None) -> PairSet:
        """The first so many pairs, which the name says if there are more; None for all."""
        if number is None or number >= len(self.pairs):
            return self
        return replace(self, name=f"{self.name}, first {number} of {len(self.pairs)}", pairs=self.pairs[:number])

    def grouped(self) -> PairSet:
        """The same with pairs of one cluster next to each other, in the place of the first of them.

        What is counted cluster by cluster needs them so, and what they share is found in the prefix cache.
        """
        places = self.clusters()
        order = sorted(range(len(places)), key=places.__getitem__)
        return replace(self, pairs=tuple(self.pairs[place] for place in order))

    def clusters(self) -> tuple[int, ...]:
        """Of each pair the place of the first one of its cluster."""
        first: dict[str, int] = {}
        return tuple(
            place if pair.cluster is None else first.setdefault(pair.cluster, place)
            for place, pair in enumerate(self.pairs)
        )


def read_pairs(path: Path, *, count: str | None = None, skip_bad: bool = False) -> PairSet:
    """Read a file of pairs of one of the kinds that `rows` names.

    Args:
        path: the file.
        count: what counts on sides that do not say it: `all` or a role; None for the module's rule.
        skip_bad: leave bad lines out, and say so, instead of refusing the file.

    Raises:
        PairsError: no such file, or a line that is not as the module says.
    """
    try:
        data = read_data(path)
    except DataError as error:
        raise PairsError(str(error)) from None
    return _gathered(path.name, hashlib.sha256(data).hexdigest(), scan_rows(data, path.name), count, skip_bad)


def _written(row: Mapping[str, object]) -> bytes:
    """A row as a line; what is no JSON becomes something that the checks of a line refuse."""
    line = json.dumps(row, ensure_ascii=False, default=lambda value: {type(value).__name__: repr(value)})
    return line.encode("utf-8", "surrogatepass")


def _gathered(name: str, digest: str, rows: Iterable[tuple[str, object]], count: str | None, skip_bad: bool) -> PairSet:
    pairs, skipped = [], []
    for place, row in rows:
        try:
            pairs.append(_pair(row, place, count))
        except PairsError as error:
            if not skip_bad:
                raise
            skipped.append(str(error))
    if not pairs:
        raise PairsError(f"{name} holds no pairs" + (f"; the first bad one: {skipped[0]}" if skipped else ""))
    return PairSet(name, digest, tuple(pairs), tuple(skipped), _rule(count))


def _rule(count: str | None) -> str:
    """In words, what counts."""
    if count is None:
        return DEFAULT_RULE
    rest = "the whole text" if count == ALL else f"all messages of role {count!r}"
    return f"the target string or other part that a pair names, else {rest}"


def _pair(row: object, origin: str, count: str | None) -> ContrastivePair:
    if isinstance(row, DataError):
        raise PairsError(str(row)) from None
    try:
        value = _Line.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PairsError(f"{origin}: {where + ': ' if where else ''}{first['msg']}") from None
    sides = (
        (value.messages_1, value.text_1, value.target_1, value.count_1),
        (value.messages_2, value.text_2, value.target_2, value.count_2),
    )
    one, two = (
        Side(messages, text, target, count if target is None and said is None else said)
        for messages, text, target, said in sides
    )
    return ContrastivePair(one, two, origin, None if value.cluster is None else str(value.cluster))
