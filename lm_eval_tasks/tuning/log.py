"""The log of a search: a header, then one line per setting tried, so that an interrupted search goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expert_registry.errors import ProfileError
from lm_eval_tasks.errors import ComparisonError
from lm_eval_tasks.line_log import LineLog
from lm_eval_tasks.tuning.search import Setting
from vllm_steermoe_plugin.detection.rows import DataError


@dataclass(slots=True)
class TuneLog:
    """Means of the main metric by task, for each setting; `None` is the unsteered model."""

    lines: LineLog
    means: dict[Setting | None, dict[str, float]]

    @classmethod
    def open(cls, path: Path, header: dict[str, Any]) -> TuneLog:
        """Begin a log, or go on with one that has the same header.

        Raises:
            ComparisonError: the log there is of another search, or damaged.
        """
        header = json.loads(json.dumps({"format": "steermoe-tune", **header}))
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
            means = {
                None if value["setting"] is None else Setting(**value["setting"]): {
                    str(task): float(mean) for task, mean in value["means"].items()
                }
                for value in values[1:]
            }
        except (KeyError, TypeError, AttributeError, ProfileError) as error:
            raise ComparisonError(f"{path} is damaged: {error!r:.200}") from None
        return cls(lines, means)

    def add(self, setting: Setting | None, means: dict[str, float]) -> None:
        """Append one line."""
        self.lines.append({"setting": None if setting is None else asdict(setting), "means": means})
        self.means[setting] = means
