"""Rows of a data file that the user gives: JSONL, JSON, CSV, or text with one prompt a line."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_steermoe_plugin.detection.datasets import DataError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".txt")
MAX_BYTES = 256 << 20
MAX_ROWS = 200_000


def find_file(folder: Path, name: str) -> Path | None:
    """`NAME` with one of `SUFFIXES` in a folder, or None.

    Raises:
        DataError: there are two.
    """
    found = [path for suffix in SUFFIXES if (path := folder / f"{name}{suffix}").is_file()]
    if len(found) > 1:
        raise DataError(f"{found[0]} and {found[1].name} both hold {name}; keep one of them")
    return found[0] if found else None


def read_rows(path: Path) -> list[Row]:
    """All rows; a line of text or a plain JSON string becomes a row with the one column `prompt`.

    Raises:
        DataError: it cannot be read, is empty or too large.
    """
    rows: list[Row] = []
    for number, value in enumerate(_values(path, read_text(path, MAX_BYTES)), start=1):
        row = {"prompt": value} if isinstance(value, str) else value
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: a row is an object or a text, got {type(row).__name__}")
        if number > MAX_ROWS:
            raise DataError(f"{path} has more than {MAX_ROWS} rows")
        rows.append(row)
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def read_text(path: Path, most: int) -> str:
    """A UTF-8 file of at most `most` bytes.

    Raises:
        DataError: it is not.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise DataError(f"{path} has more than {most} bytes")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: it is not UTF-8 text") from None


def _values(path: Path, text: str) -> Sequence[Any]:
    if path.suffix == ".txt":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        if path.suffix == ".csv":
            return list(csv.DictReader(text.splitlines(keepends=True), strict=True))
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        value = json.loads(text)
    except (ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from None
    if not isinstance(value, list):
        raise DataError(f"{path}: the JSON must be a list of rows, got {type(value).__name__}")
    return value
