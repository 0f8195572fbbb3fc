"""The log of a search: a header, then one line per setting tried, so that an interrupted search goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expert_registry.errors import ProfileError
from lm_eval_tasks.data_files import read_text
from lm_eval_tasks.errors import ComparisonError
from lm_eval_tasks.tuning.search import Setting
from vllm_steermoe_plugin.detection.datasets import DataError

MAX_BYTES = 64 << 20


@dataclass(slots=True)
class TuneLog:
    """Means of the main metric by task, for each setting; `None` is the unsteered model."""

    path: Path
    means: dict[Setting | None, dict[str, float]]

    @classmethod
    def open(cls, path: Path, header: dict[str, Any]) -> TuneLog:
        """Begin a log, or go on with one that has the same header.

        Raises:
            ComparisonError: the log there is of another search, or damaged.
        """
        header = json.loads(json.dumps({"format": "steermoe-tune", **header}))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")
            return cls(path, {})
        try:
            text = read_text(path, MAX_BYTES)
        except DataError as error:
            raise ComparisonError(str(error)) from None
        # Whoever was interrupted while writing leaves half a line.
        whole, _, _ = text.rpartition("\n")
        lines = [line for line in whole.split("\n") if line]
        try:
            values = [json.loads(line) for line in lines]
            if not values or values[0] != header:
                first = values[0] if values and isinstance(values[0], dict) else {}
                other = sorted(key for key in header if first.get(key) != header[key])
                raise ComparisonError(
                    f"{path} is the log of another search (other {', '.join(other)}); give another --out"
                )
            means = {
                None if value["setting"] is None else Setting(**value["setting"]): {
                    str(task): float(mean) for task, mean in value["means"].items()
                }
                for value in values[1:]
            }
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, ProfileError) as error:
            raise ComparisonError(f"{path} is damaged: {error!r:.200}") from None
        path.write_text(whole + "\n", encoding="utf-8")
        return cls(path, means)

    def add(self, setting: Setting | None, means: dict[str, float]) -> None:
        """Append one line."""
        value = {"setting": None if setting is None else asdict(setting), "means": means}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
        self.means[setting] = means
