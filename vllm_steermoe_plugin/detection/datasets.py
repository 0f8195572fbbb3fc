"""Rows of public data sets: from the hub by their id, or from a file with the same columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_steermoe_plugin.detection.pairs import COLUMNS, PairSet
from vllm_steermoe_plugin.detection.rows import DataError, read_rows, without_none

_SHOWN = 12
"""Columns that an error lists."""


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
        """Each row with its place (for errors), from the hub or from a file.

        Raises:
            DataError: it cannot be loaded, or lacks a column.
        """
        empty = True
        for place, row in _from_hub(self) if data_file is None else read_rows(data_file):
            missing = [column for column in self.columns if column not in row]
            if missing:
                wanted = f"of {self.id} are read: {', '.join(self.columns)}"
                raise DataError(f"{place} has no {', '.join(missing)}, only {_listed(row)}; {wanted}")
            empty = False
            yield place, row
        if empty:
            raise DataError(f"{self.id} has no rows")


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
    return place, {key: without_none(row[key]) for key in COLUMNS if row.get(key) is not None}


def _listed(row: Mapping[str, Any]) -> str:
    names = [str(name)[:40] for name in row]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more
