"""Contrastive pairs: two texts that differ in a behaviour, and which tokens of each are counted.

A file of pairs is JSONL. Each line has `messages_1` and `messages_2` (chat messages) or
`text_1` and `text_2`, and may have `target_1` and `target_2`: the part of the text that
counts (its last occurrence). Without targets the last assistant message counts, or, in
plain text, everything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from expert_registry.errors import SteerMoEError

MAX_LINE = 1 << 20


class PairsError(SteerMoEError):
    """A file of pairs, or a pair in it, cannot be used; the message names file and line."""


class ChatMessage(BaseModel):
    """One chat message."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    messages_1: tuple[ChatMessage, ...] | None = None
    messages_2: tuple[ChatMessage, ...] | None = None
    text_1: str | None = None
    text_2: str | None = None
    target_1: Annotated[str, Field(min_length=1)] | None = None
    target_2: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _both_sides_alike(self) -> Self:
        chat = (self.messages_1 is not None, self.messages_2 is not None)
        text = (self.text_1 is not None, self.text_2 is not None)
        if (chat, text) not in (((True, True), (False, False)), ((False, False), (True, True))):
            raise ValueError("a pair has messages_1 and messages_2, or text_1 and text_2")
        return self


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a pair: `messages` or `text`, and the target string that counts, if named."""

    messages: tuple[ChatMessage, ...] | None = None
    text: str | None = None
    target: str | None = None


@dataclass(frozen=True, slots=True)
class ContrastivePair:
    """Side 1 shows the behaviour, side 2 does not. `origin` names file and line in errors."""

    side_1: Side
    side_2: Side
    origin: str


@dataclass(frozen=True, slots=True)
class PairSet:
    """Pairs with the name and hash that stand in a ranking's card."""

    name: str
    sha256: str
    pairs: tuple[ContrastivePair, ...]

    @classmethod
    def from_messages(
        cls, name: str, pairs: Iterable[tuple[Sequence[dict[str, str]], Sequence[dict[str, str]]]]
    ) -> PairSet:
        """Pairs of chats made in Python; they hash as the file that they would be."""
        lines = [json.dumps({"messages_1": one, "messages_2": two}, ensure_ascii=False) for one, two in pairs]
        return _parse("\n".join(lines).encode(), name)


def read_pairs(path: Path) -> PairSet:
    """Read a JSONL file of pairs.

    Raises:
        PairsError: no such file, or a line that is not as the module says.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PairsError(f"cannot read {path}: {error.strerror}") from None
    return _parse(data, path.name)


def _parse(data: bytes, name: str) -> PairSet:
    pairs = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        origin = f"{name}, line {number}"
        if len(line) > MAX_LINE:
            raise PairsError(f"{origin}: {len(line)} bytes; at most {MAX_LINE} are read")
        try:
            value = _Line.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise PairsError(f"{origin}: {where + ': ' if where else ''}{first['msg']}") from None
        pairs.append(
            ContrastivePair(
                Side(value.messages_1, value.text_1, value.target_1),
                Side(value.messages_2, value.text_2, value.target_2),
                origin,
            )
        )
    if not pairs:
        raise PairsError(f"{name} holds no pairs")
    return PairSet(name, hashlib.sha256(data).hexdigest(), tuple(pairs))
