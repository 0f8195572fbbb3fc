"""The log of a search: a header, then one line per steering measured, so that an interrupted search goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expert_registry.errors import ProfileError
from lm_eval_tasks.compare.run_file import Run, parse_run
from lm_eval_tasks.errors import ComparisonError
from lm_eval_tasks.line_log import LineLog
from lm_eval_tasks.tuning.settings import Counts, Dial, Setting
from vllm_steermoe_plugin.detection.rows import DataError

Key = tuple[Setting | None, int | None]
"""A setting, None for the unsteered model; and the seed of a random control of it, None for itself."""


@dataclass(slots=True)
class TuneLog:
    """What was measured: for each key a run with one profile."""

    lines: LineLog
    runs: dict[Key, Run]

    @classmethod
    def open(cls, path: Path, header: dict[str, Any]) -> TuneLog:
        """Begin a log, or go on with one that has the same header.

        Raises:
            ComparisonError: the log there is of another search, or damaged.
        """
        header = json.loads(json.dumps({"format": "steermoe-tune", "format_version": 2, **header}))
        lines = LineLog(path)
        try:
            values = lines.read()
        except DataError as error:
            raise ComparisonError(f"{error} (a damaged log)") from None
        if not values:
            lines.append(header)
        elif values[0] != header:
            first = values[0] if isinstance(values[0], dict) else {}
            other = sorted(key for key in header if first.get(key) != header[key])
            raise ComparisonError(f"{path} is the log of another search (other {', '.join(other)}); give another --out")
        try:
            runs = {
                (_setting(value["setting"]), value["draw"]): parse_run(value["run"], str(path)) for value in values[1:]
            }
        except (KeyError, TypeError, AttributeError, ProfileError) as error:
            raise ComparisonError(f"{path} is damaged: {error!r:.200}") from None
        return cls(lines, runs)

    def add(self, key: Key, run: Run) -> None:
        """Append one line."""
        setting, draw = key
        value = {"setting": None if setting is None else asdict(setting), "draw": draw, "run": run.model_dump()}
        self.lines.append(value)
        self.runs[key] = run


def _setting(value: Any) -> Setting | None:
    if value is None:
        return None
    return Dial(**value) if "strength" in value else Counts(**value)
