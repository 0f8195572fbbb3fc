"""Rows of a data file: JSON lines, a JSON list, CSV, text with one prompt a line, or Parquet.

The suffix says which; a file with another suffix, or none, is JSON, in lines or as a list. Text is UTF-8, with or
without a byte order mark, and only a newline ends a line: U+2028, U+0085 and form feeds occur in prompts.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from expert_registry.errors import SteerMoEError

Row = dict[str, Any]
Scanned = Iterator[tuple[str, Any]]
SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".parquet")
MAX_BYTES = 2 << 30
MAX_ROWS = 5_000_000


class DataError(SteerMoEError):
    """A data set or file cannot be had, or its rows are not as expected."""

    code = "STEERMOE-E402"


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """All rows, each with its file and line for errors; plain text becomes a row with the one column `prompt`.

    Raises:
        DataError: the file cannot be read or is empty, or a row is no row.
    """
    empty = True
    for place, value in scan_rows(read_data(path), path.name):
        row = {"prompt": value} if isinstance(value, str) else value
        if isinstance(row, DataError):
            raise row
        if not isinstance(row, dict):
            raise DataError(f"{place}: a row is an object or a text, got {row!r:.60}")
        empty = False
        yield place, row
    if empty:
        raise DataError(f"{path} has no rows")


def scan_rows(data: bytes, name: str) -> Scanned:
    """All rows, whatever they are, each with its place; a DataError stands for a row that cannot be read.

    Args:
        data: what the file holds.
        name: of the file.
    """
    scan = _SCANNERS.get(Path(name).suffix.lower(), _json)
    for number, found in enumerate(scan(data.removeprefix(codecs.BOM_UTF8), name), start=1):
        if number > MAX_ROWS:
            yield name, DataError(f"{name} has more than {MAX_ROWS} rows")
            return
        yield found


def read_data(path: Path, most: int = MAX_BYTES) -> bytes:
    """The bytes of a file that has at most `most`.

    Raises:
        DataError: it cannot be read, or has more.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > most:
        raise DataError(f"{path} is larger than {most} bytes")
    return data


def read_text(path: Path, most: int) -> str:
    """The text of a UTF-8 file of at most `most` bytes.

    Raises:
        DataError: it is not that.
    """
    try:
        return read_data(path, most).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text") from None


def parse_json(data: bytes, place: str) -> Any:
    """The JSON value in UTF-8 text, in which no key stands twice; a DataError if there is none."""
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_each_key_once)
    except (ValueError, RecursionError) as error:
        # Of one line, which `place` names, the number is always 1.
        return DataError(f"{place}: not JSON: {str(error).replace('line 1 column', 'column')}")


def text_of(row: Mapping[str, Any], column: str, place: str) -> str:
    """A column that must hold text, without the white space around it.

    Raises:
        DataError: it holds something else, or nothing.
    """
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {column} must be text, got {value!r:.60}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{place}: {column} holds half a character (a lone surrogate), which is no text")
    return value.strip()


def without_none(value: Any) -> Any:
    """Of structures in lists only what they have: in columns, all of them have all fields."""
    if not isinstance(value, list):
        return value
    return [{k: v for k, v in one.items() if v is not None} if isinstance(one, dict) else one for one in value]


def _json(data: bytes, name: str) -> Scanned:
    if data.lstrip()[:1] != b"[":
        yield from _json_lines(data, name)
        return
    value = parse_json(data, name)
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        yield f"{name}, entry {number}", row


def _json_lines(data: bytes, name: str) -> Scanned:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield (place := f"{name}, line {number}"), parse_json(line, place)


def _text_lines(data: bytes, name: str) -> Scanned:
    for number, line in enumerate(data.split(b"\n"), start=1):
        place = f"{name}, line {number}"
        try:
            if text := line.decode().strip():
                yield place, text
        except UnicodeDecodeError:
            yield place, DataError(f"{place} is not UTF-8 text")


def _csv(data: bytes, name: str) -> Scanned:
    """An empty field is None, as in Parquet; the place is the row's last line."""
    try:
        # With this newline, a line ends nowhere else, and a quoted field keeps its own.
        rows = csv.DictReader(io.StringIO(data.decode(), newline="\n"), strict=True)
    except UnicodeDecodeError as error:
        yield name, DataError(f"{name}, line {1 + data[: error.start].count(10)} is not UTF-8 text")
        return
    try:
        header = list(rows.fieldnames or ())
        if len(set(header)) < len(header) or not all(header):
            raise csv.Error(f"the first line must name the columns, got {header!r:.200}")
        for row in rows:
            place = f"{name}, line {rows.line_num}"
            if None in row or None in row.values():
                fault = f"other fields than the header's {len(header)}; put a text with a comma into quotes"
                yield place, DataError(f"{place}: {fault}")
            else:
                yield place, {column: field or None for column, field in row.items()}
    except csv.Error as error:
        yield name, DataError(f"{name}, line {rows.reader.line_num}: not CSV: {error}")


def _parquet(data: bytes, name: str) -> Scanned:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        yield name, DataError(f"{name} is read with the package 'pyarrow', which is not installed; give JSON lines")
        return
    number = 0
    try:
        for batch in parquet.ParquetFile(pyarrow.BufferReader(data)).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{name}, row {number}", {key: without_none(value) for key, value in row.items()}
    except (pyarrow.ArrowException, OSError) as error:
        yield name, DataError(f"{name}, after row {number}: not Parquet: {error!s:.200}")


_SCANNERS: dict[str, Callable[[bytes, str], Scanned]] = {
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".txt": _text_lines,
    ".parquet": _parquet,
}


def _each_key_once(items: list[tuple[str, Any]]) -> Row:
    """Of a key that stands twice JSON readers silently take one value."""
    found = dict(items)
    if len(found) < len(items):
        keys = [key for key, _ in items]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} stands twice")
    return found
