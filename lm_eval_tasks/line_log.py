"""A log of JSON lines that is only ever appended to, so that no interruption loses what it holds."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_steermoe_plugin.detection.rows import DataError, parse_json, read_data

MAX_BYTES = 1 << 30
_CANCELLED = b"\x18"
"""Ends a line that an interruption tore; JSON lines cannot end so."""


@dataclass(frozen=True, slots=True)
class LineLog:
    """The log at `path`, which need not exist yet."""

    path: Path

    def read(self) -> list[Any]:
        """The values of all whole lines.

        Raises:
            DataError: the file cannot be read, or a whole line is not JSON.
        """
        if not self.path.exists():
            return []
        *whole, _ = read_data(self.path, MAX_BYTES).split(b"\n")
        values = []
        for number, line in enumerate(whole, start=1):
            if line and not line.endswith(_CANCELLED):
                value = parse_json(line, f"{self.path}, line {number}")
                if isinstance(value, DataError):
                    raise value
                values.append(value)
        return values

    def append(self, value: Any) -> None:
        """Append one line, after marking a torn one as such."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            torn = False
            if file.tell():
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
            file.write((_CANCELLED + b"\n" if torn else b"") + json.dumps(value).encode() + b"\n")
