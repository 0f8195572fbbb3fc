"""Where the documents of the paper's data sets come from: the user's folder first, else the hub.

The folder is the environment variable STEERMOE_DATA, or `steermoe_data` in lm-eval's
`--metadata`. A file in it has the name of the source and the columns of the original.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_steermoe_plugin.detection.datasets import hub_rows
from vllm_steermoe_plugin.detection.rows import SUFFIXES, DataError, Row, read_rows

FOLDER_VARIABLE = "STEERMOE_DATA"


@dataclass(frozen=True, slots=True)
class Source:
    """One data set as it is published.

    Attributes:
        columns: that a task reads; alternatives are separated by `|`.
        hub: arguments of `datasets.load_dataset`, or None where no hub has it.
        where: for a person who must fetch it.
    """

    columns: tuple[str, ...]
    where: str
    hub: Mapping[str, Any] | None = None


_MQUAKE = "https://raw.githubusercontent.com/princeton-nlp/MQuAKE/main/datasets/MQuAKE-CF-3k-v2.json"
_CF_TRIVIAQA = "https://raw.githubusercontent.com/google-research-datasets/cf_triviaqa/main/har_dataset.jsonl"

SOURCES: dict[str, Source] = {
    "faitheval_counterfactual": Source(
        ("context", "question", "choices", "answerKey"),
        "Salesforce/FaithEval-counterfactual-v1.0",
        {"path": "Salesforce/FaithEval-counterfactual-v1.0", "split": "test"},
    ),
    "faitheval_unanswerable": Source(
        ("context", "question"),
        "Salesforce/FaithEval-unanswerable-v1.0",
        {"path": "Salesforce/FaithEval-unanswerable-v1.0", "split": "test"},
    ),
    "faitheval_inconsistent": Source(
        ("context", "question"),
        "Salesforce/FaithEval-inconsistent-v1.0",
        {"path": "Salesforce/FaithEval-inconsistent-v1.0", "split": "test"},
    ),
    "cf_triviaqa": Source(
        ("question_text", "paragraph_text", "annotation"),
        "har_dataset.jsonl of google-research-datasets/cf_triviaqa",
        {"path": "json", "data_files": _CF_TRIVIAQA, "split": "train"},
    ),
    "mquake": Source(
        ("requested_rewrite",),
        "MQuAKE-CF-3k-v2.json of princeton-nlp/MQuAKE",
        {"path": "json", "data_files": _MQUAKE, "split": "train"},
    ),
    "mctest": Source(
        ("story", "question", "answer_options", "answer"),
        "sagnikrayc/mctest, branch refs/convert/parquet",
        {
            "path": "sagnikrayc/mctest",
            "revision": "refs/convert/parquet",
            # The main branch is a loading script, which datasets no longer runs.
            "data_files": ["mc500/test/0000.parquet", "mc160/test/0000.parquet"],
            "split": "train",
        },
    ),
    "tdc2023": Source(("prompt|behavior",), "the behaviours of the red-teaming track of TDC 2023"),
    "malicious_instruct": Source(("prompt",), "MaliciousInstruct.txt of Princeton-SysML/Jailbreak_LLM"),
    "advbench": Source(
        ("prompt|goal",), "walledai/AdvBench (accept its terms first)", {"path": "walledai/AdvBench", "split": "train"}
    ),
    "strongreject": Source(
        ("prompt|forbidden_prompt",),
        "the 60-prompt file of StrongREJECT, as in the paper, or all 313 of walledai/StrongREJECT "
        "(accept its terms first)",
        {"path": "walledai/StrongREJECT", "split": "train"},
    ),
}


def load_rows(source: str, folder: str | None = None) -> list[Row]:
    """The rows of a source, each with the columns that its task reads.

    Args:
        source: of `SOURCES`.
        folder: of the user's files; None for the one in the environment, if any.

    Raises:
        DataError: it is nowhere to be had, or has other columns.
    """
    named = folder or os.environ.get(FOLDER_VARIABLE)
    path = None if named is None else _find_file(Path(named), source)
    wanted = [column.split("|") for column in SOURCES[source].columns]
    rows = []
    for place, row in read_rows(path) if path is not None else _from_hub(source):
        for names in wanted:
            if all(row.get(one) in (None, "", [], {}) for one in names):
                header = "; a CSV file begins with a header" if path is not None and path.suffix == ".csv" else ""
                has = ", ".join(sorted(map(str, row)))[:200]
                raise DataError(f"{place}: no {' or '.join(map(repr, names))}; it has {has}{header}")
        rows.append(row)
    return rows


def _find_file(folder: Path, name: str) -> Path | None:
    if not folder.is_dir():
        raise DataError(f"the folder for data files, {folder}, does not exist (set {FOLDER_VARIABLE} to one)")
    found = [path for suffix in SUFFIXES if (path := folder / f"{name}{suffix}").is_file()]
    if len(found) > 1:
        raise DataError(f"{found[0]} and {found[1].name} both hold {name}; keep one of them")
    return found[0] if found else None


def _from_hub(source: str) -> Iterator[tuple[str, Row]]:
    spec = SOURCES[source]
    files = f"{source}{{{','.join(SUFFIXES)}}}"
    give = f"put it into a folder as {files} with the columns {', '.join(spec.columns)} and set {FOLDER_VARIABLE}"
    if spec.hub is None:
        raise DataError(f"{source}: no hub is known to have it; get {spec.where}, {give} to that folder")
    for number, row in enumerate(
        hub_rows(f"{source} ({spec.where})", f"or {give} to that folder", **spec.hub), start=1
    ):
        yield f"{spec.where}, row {number}", dict(row)
