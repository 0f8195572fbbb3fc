"""Rows of public data sets: from the hub by their id, or from a file with the same columns."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expert_registry.errors import SteerMoEError
from vllm_steermoe_plugin.detection.pairs import COLUMNS, MAX_FILE_BYTES, PairSet

_SHOWN = 12
"""Columns that an error lists."""


class DataError(SteerMoEError):
    """A data set cannot be had, or its columns are not as expected."""

    code = "STEERMOE-E402"


@dataclass(frozen=True, slots=True)
class DataSource:
    """A data set of the hub.

    Attributes:
        id: `owner/name`.
        split: of it.
        columns: those that are read.
        license: of the data.
    """

    id: str
    split: str
    columns: tuple[str, ...]
    license: str

    def rows(self, data_file: Path | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Each row with its place (for errors), from the hub or from a JSON or JSONL file.

        Raises:
            DataError: it cannot be loaded, or lacks a column.
        """
        found = _from_hub(self) if data_file is None else _from_file(data_file)
        empty = True
        for place, row in found:
            if not isinstance(row, Mapping):
                raise DataError(f"{place} is no JSON object, but {row!r:.60}; wanted: {', '.join(self.columns)}")
            missing = [column for column in self.columns if column not in row]
            if missing:
                wanted = f"of {self.id} are read: {', '.join(self.columns)}"
                raise DataError(f"{place} has no {', '.join(missing)}, only {_listed(row)}; {wanted}")
            empty = False
            yield place, row
        if empty:
            raise DataError(f"{data_file or self.id} holds no rows")


def _from_hub(source: DataSource) -> Iterator[tuple[str, Any]]:
    columns = ", ".join(source.columns)
    way_out = (
        f"without the network, give the rows by --data-file FILE: JSON lines with the columns {columns}"
        if columns
        else "without the network, give the pairs by --pairs FILE"
    )
    for number, row in enumerate(
        hub_rows(f"{source.id}, split {source.split}", way_out, source.id, split=source.split)
    ):
        yield f"{source.id}, row {number}", row


def hub_rows(name: str, way_out: str, *arguments: Any, **options: Any) -> Iterable[Any]:
    """What `datasets.load_dataset` loads.

    Args:
        name: of the data, for errors.
        way_out: what to do where the hub cannot be reached.
        arguments, options: go to `load_dataset`.

    Raises:
        DataError: it cannot be loaded.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name} is loaded with the package 'datasets', which is not installed; {way_out}") from None
    try:
        loaded: Iterable[Any] = datasets.load_dataset(*arguments, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"cannot load {name}: {reason:.300}; {way_out}") from None
    return loaded


def _from_file(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    try:
        data = data.removeprefix(codecs.BOM_UTF8)
        if data.lstrip()[:1] == b"[":
            for number, row in enumerate(json.loads(data), start=1):
                yield f"{path.name}, entry {number}", row
            return
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path.name}, line {number} is not JSON: {error}") from None
        yield f"{path.name}, line {number}", row


def pairs_from_hub(name: str, *, count: str | None = None, skip_bad: bool = False) -> PairSet:
    """Contrastive pairs from a data set that has the columns of a file of pairs.

    Args:
        name: `owner/name` or, with another split than `train`, `owner/name:split`.
        count: as for `read_pairs`.
        skip_bad: likewise.

    Raises:
        DataError: it cannot be loaded.
        PairsError: a row is not a pair.
    """
    identifier, _, split = name.partition(":")
    source = DataSource(identifier, split or "train", (), "unspecified")
    whence = f"{identifier}, split {source.split}"
    return PairSet.from_rows(whence, map(_pair_columns, source.rows()), count=count, skip_bad=skip_bad)


def _pair_columns(found: tuple[str, Mapping[str, Any]]) -> tuple[str, Mapping[str, Any]]:
    """Of a row what a line of a file of pairs has.

    A data set has all columns in all rows, and all fields in all messages; those that a row does not use are None.
    It may have other columns too.

    Raises:
        DataError: it has none of a pair's.
    """
    place, row = found
    if not set(COLUMNS) & set(row):
        raise DataError(f"{place} has the columns {_listed(row)}; pairs have some of {', '.join(COLUMNS)}")
    return place, {key: _without_none(row[key]) for key in COLUMNS if row.get(key) is not None}


def _without_none(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [
        {key: part for key, part in one.items() if part is not None} if isinstance(one, Mapping) else one
        for one in value
    ]


def _listed(row: Mapping[str, Any]) -> str:
    names = [str(name)[:40] for name in row]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more


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
