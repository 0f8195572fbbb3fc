"""What the parts of the check find, one JSON line each, written at once: whoever is stopped loses nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu.memory import Footprint
from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.rows import ColdTime, HostTime, Row, SelectionRow, TileTime

Record = Outcome | Row | SelectionRow | ColdTime | Footprint | HostTime | TileTime
_KINDS: dict[str, type[Record]] = {
    kind.__name__: kind for kind in (Outcome, Row, SelectionRow, ColdTime, Footprint, HostTime, TileTime)
}


def append(path: Path, record: Record) -> None:
    """Add one line. Several processes may do so at a time: a line is one write."""
    line = json.dumps({"kind": type(record).__name__, **asdict(record)}) + "\n"
    with path.open("ab", buffering=0) as file:
        file.write(line.encode())


def read(path: Path) -> list[Record]:
    """All records but a last one that was cut off."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = []
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            value = json.loads(line)
            found.append(_KINDS[value.pop("kind")](**value))
    return found
