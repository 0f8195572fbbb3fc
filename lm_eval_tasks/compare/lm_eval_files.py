"""Results of lm-eval as runs: in memory, or the files of `lm_eval --output_path DIR --log_samples`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lm_eval_tasks.compare.run_file import FORMAT, ProfileRecord, Run, TaskRecord, parse_run, read_json
from lm_eval_tasks.errors import ComparisonError
from vllm_steermoe_plugin.detection.rows import DataError, read_rows

Sample = Mapping[str, Any]


def read_any_run(path: Path) -> Run:
    """A run from a file of `steermoe eval`, or from lm-eval's `results_*.json` with its samples beside it.

    Raises:
        ComparisonError: it is neither.
    """
    value = read_json(path)
    if isinstance(value, dict) and value.get("format") == FORMAT:
        return parse_run(value, str(path))
    if not isinstance(value, dict) or not isinstance(value.get("results"), dict):
        raise ComparisonError(f"{path} is neither a file of `steermoe eval` nor lm-eval's results")
    stamp = path.stem.removeprefix("results_")
    samples: dict[str, Sequence[Sample]] = {}
    for task in value.get("configs", {}):
        beside = path.with_name(f"samples_{task}_{stamp}.jsonl")
        try:
            samples[task] = [row for _, row in read_rows(beside)]
        except DataError as error:
            raise ComparisonError(f"{path}: paired comparison needs --log_samples: {error}") from None
    try:
        return run_of({**value, "samples": samples})
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ComparisonError(f"{path} is not as lm-eval writes it: {error!r:.200}") from None


def run_of(results: Mapping[str, Any], keep_responses: bool = True) -> Run:
    """A run with one profile, from what `simple_evaluate` returns.

    Raises:
        ComparisonError: a task has several filters, so that it has several outcomes per example.
    """
    config = results["config"]
    steering = dict(config.get("steermoe") or {})
    name = steering.get("request") or f"unsteered {config.get('model')}"
    arguments = config.get("model_args")
    fallback = arguments.get("pretrained") if isinstance(arguments, dict) else str(arguments or config.get("model"))
    tasks = {task: task_record(results, task) for task in results["configs"]}
    ordered = {task: _ordered(results["samples"][task]) for task in tasks}
    profile = ProfileRecord(
        name=_short(name),
        kind="steered" if steering.get("profile") else "none",
        steering=steering,
        outcomes={
            task: {metric: [float(sample[metric]) for sample in ordered[task]] for metric in record.metrics}
            for task, record in tasks.items()
        },
        responses={task: _texts(ordered[task]) for task in tasks if keep_responses and _texts(ordered[task])},
    )
    return Run(
        created=_date(results.get("date")),
        model=_short(str(steering.get("model") or fallback)),
        settings={
            "limit": config.get("limit"),
            "gen_kwargs": config.get("gen_kwargs") or {},
            "seed": config.get("random_seed"),
            "shots": dict(results.get("n-shot", {})),
        },
        versions={key: str(version) for key, version in steering.get("versions", {}).items()},
        tasks=tasks,
        profiles=[profile],
        requests={task: _requests(ordered[task]) for task in profile.responses if _requests(ordered[task])},
    )


def task_record(results: Mapping[str, Any], task: str) -> TaskRecord:
    """What identifies a task and the documents that it was run on."""
    config, samples = results["configs"][task], _ordered(results["samples"][task])
    filters = sorted({str(sample["filter"]) for sample in samples})
    if len(filters) != 1:
        raise ComparisonError(f"task {task} has the filters {', '.join(filters)}; only tasks with one pair by example")
    better = results["higher_is_better"][task]
    metrics = [metric for metric in samples[0]["metrics"] if isinstance(samples[0].get(metric), int | float)]
    if not metrics:
        raise ComparisonError(f"task {task} has no metric with one value per example")
    return TaskRecord(
        version=str(results["versions"].get(task, "")),
        # lm-eval does not know of each metric which way is up; mostly it is.
        metrics={metric: better.get(metric) is not False for metric in metrics},
        control=bool((config.get("metadata") or {}).get("control")),
        examples=len(samples),
        documents=_hash(samples, "doc_hash", "target_hash"),
        prompts=_hash(samples, "prompt_hash"),
        generation=json.loads(json.dumps(config.get("generation_kwargs") or {}, default=str)),
    )


def _ordered(samples: Sequence[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda sample: int(sample["doc_id"]))


def _hash(samples: Sequence[Sample], *keys: str) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(":".join([str(sample["doc_id"]), *(str(sample[key]) for key in keys)]).encode() + b"\n")
    return digest.hexdigest()


def _texts(samples: Sequence[Sample]) -> list[str]:
    """Generated texts; none for likelihoods."""
    found = [sample["resps"][0][0] for sample in samples if sample.get("resps") and sample["resps"][0]]
    return found if len(found) == len(samples) and all(isinstance(text, str) for text in found) else []


def _date(seconds: Any) -> str:
    """As lm-eval gives it, in seconds since 1970."""
    moment = datetime.fromtimestamp(seconds, UTC) if isinstance(seconds, int | float) else None
    return moment.strftime("%Y-%m-%d %H:%M UTC") if moment else ""


def _requests(samples: Sequence[Sample]) -> list[str]:
    """What was asked: of our own tasks, whose documents say it."""
    docs = [sample["doc"] for sample in samples]
    found = [str(doc.get("request") or doc.get("prompt") or "") for doc in docs if isinstance(doc, dict)]
    return found if len(found) == len(samples) and all(found) else []


def _short(text: str) -> str:
    """A name for reports; an expert set is known by its hash."""
    if len(text) <= 120:
        return text
    return f"{text[:40]}... ({hashlib.sha256(text.encode()).hexdigest()[:12]})"
