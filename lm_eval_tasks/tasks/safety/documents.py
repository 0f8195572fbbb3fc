"""Requests as prompts, plain or inside a template from the user's own file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from datasets import Dataset

from lm_eval_tasks.tasks.sources import SOURCES, load_rows
from vllm_steermoe_plugin.detection.rows import DataError, read_text

TEMPLATE_VARIABLE = "STEERMOE_TEMPLATE"
PLACE = "{prompt}"
NO_TEMPLATE = "none"
MAX_TEMPLATE = 64 << 10


def documents(
    *,
    source: str,
    templated: bool = False,
    steermoe_data: str | None = None,
    steermoe_template: str | None = None,
    **_: Any,
) -> dict[str, Dataset]:
    """The test split of a set.

    Args:
        source: the set, of `SOURCES`.
        templated: the set is meant to be asked inside a template, so one must be named.
        steermoe_data: folder of the user's data files.
        steermoe_template: file of the template, or `none`; otherwise STEERMOE_TEMPLATE says it.
        _: what lm-eval passes besides.

    Raises:
        DataError: the set or the template is not to be had.
    """
    template = read_template(steermoe_template or os.environ.get(TEMPLATE_VARIABLE), source) if templated else PLACE
    names = SOURCES[source].columns[0].split("|")
    rows = []
    for number, row in enumerate(load_rows(source, steermoe_data), start=1):
        request = str(next(row[name] for name in names if row.get(name))).strip()
        rows.append({"id": str(number), "request": request, "prompt": template.replace(PLACE, request)})
    return {"test": Dataset.from_list(rows)}


def read_template(name: str | None, source: str) -> str:
    """The template's text, with `{prompt}` where the request goes.

    Raises:
        DataError: none was named, or it is not a template.
    """
    if name is None:
        raise DataError(
            f"{source} is asked inside a template, and none ships with this package: set {TEMPLATE_VARIABLE} to a text "
            f"file that holds {PLACE} where the request goes, or to {NO_TEMPLATE!r} to ask directly"
        )
    if name == NO_TEMPLATE:
        return PLACE
    text = read_text(Path(name), MAX_TEMPLATE)
    if text.count(PLACE) != 1:
        raise DataError(
            f"template {name}: {PLACE} must stand in it exactly once, it stands there {text.count(PLACE)} times"
        )
    return text
