"""Documents of the controls."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from datasets import Dataset

from lm_eval_tasks.tasks.faithfulness.documents import LETTERS, with_options
from lm_eval_tasks.tasks.sources import load_rows
from vllm_steermoe_plugin.detection.rows import DataError

HARMLESS_FILE = "harmless.txt"


def mctest(*, steermoe_data: str | None = None, **_: Any) -> dict[str, Dataset]:
    """The test splits of MC500 and MC160.

    Raises:
        DataError: not to be had, or a row is not as published.
    """
    rows = []
    for number, row in enumerate(load_rows("mctest", steermoe_data), start=1):
        options, answer = row["answer_options"], str(row["answer"])
        if not isinstance(options, dict) or sorted(options) != list(LETTERS[:4]) or answer not in options:
            raise DataError(f"mctest, row {number}: the options must be A to D and the answer one of them")
        story = str(row["story"]).replace("\\newline", "\n")
        ordered = [str(options[letter]) for letter in LETTERS[:4]]
        prompt = (
            f"Document: {story}\n{with_options(str(row['question']), ordered)}\n"
            "Give the letter of the right option and nothing else.\nAnswer:"
        )
        rows.append({"id": str(number), "prompt": prompt, "options": ordered, "label": LETTERS.index(answer)})
    return {"test": Dataset.from_list(rows)}


def harmless(**_: Any) -> dict[str, Dataset]:
    """Harmless requests with verbs that sound otherwise; they ship with the package."""
    return {
        "test": Dataset.from_list([{"id": str(i), "prompt": prompt} for i, prompt in enumerate(harmless_prompts(), 1)])
    }


def harmless_prompts() -> list[str]:
    """One prompt per line of `harmless.txt`."""
    return files(__package__).joinpath(HARMLESS_FILE).read_text(encoding="utf-8").splitlines()
