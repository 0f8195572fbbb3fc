"""Small JSON documents with a schema: status, lock and index files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from expert_registry.errors import RankingFormatError
from expert_registry.files import read_bounded, write_atomic


class Strict(BaseModel):
    """Unknown fields are refused, nothing is converted, nothing can be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Document = TypeVar("Document", bound=Strict)


def parse_document(text: bytes | str, schema: type[Document], name: str) -> Document:
    """Check JSON text against a schema.

    Raises:
        RankingFormatError: names the first field that is wrong.
    """
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RankingFormatError(f"{name}: bad field {where[:200]!r}: {first['msg']}") from None


def read_document(path: Path, schema: type[Document], limit: int, *, inside: Path | None = None) -> Document:
    """Read and check a document of at most `limit` bytes (`inside`: see `read_bounded`).

    Raises:
        FileError: unreadable or too large.
        RankingFormatError: not as the schema says.
    """
    return parse_document(read_bounded(path, limit, inside=inside), schema, str(path))


def write_document(path: Path, document: Strict) -> None:
    """Write a document atomically, with sorted keys; an older one is replaced."""
    fields = document.model_dump(mode="json", exclude_defaults=False)
    write_atomic(path, (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode(), overwrite=True)
