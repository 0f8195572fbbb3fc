"""The file of `steermoe eval`: outcomes of every example under every profile, and how they came about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from expert_registry.files import write_atomic
from lm_eval_tasks.errors import ComparisonError
from vllm_steermoe_plugin.detection.rows import DataError, parse_json, read_data

FORMAT = "steermoe-run"
MAX_BYTES = 512 << 20
Short = Annotated[str, Field(max_length=500)]
Outcomes = list[FiniteFloat]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TaskRecord(_Strict):
    """What a task was: two runs of it pair only if all of this is equal."""

    version: Short
    metrics: dict[Short, bool]
    """Metric -> whether higher is better; the first is the one that the task is about."""
    control: bool = False
    """Whether steering should leave it where it is."""
    examples: Annotated[int, Field(ge=1, le=10_000_000)]
    documents: Short
    """sha256 over the documents, in order."""
    prompts: Short
    """sha256 over the prompts as they went to the model, in order."""
    generation: dict[str, Any] = {}


class ProfileRecord(_Strict):
    """One steering and what came of it."""

    name: Short
    """As it was asked for."""
    kind: Literal["none", "steered", "random"]
    of: Short | None = None
    """For `random`: the name of the profile whose numbers of experts and biases it has."""
    steering: dict[str, Any] = {}
    """`config.steermoe` of lm-eval's results."""
    outcomes: dict[Short, dict[Short, Outcomes]]
    """Task -> metric -> one value per example."""
    responses: dict[Short, list[str]] = {}
    """Task -> generated texts, where they were kept."""
    divergence: Outcomes = []
    """KL divergence of the next token from the unsteered model after each of some prompts, in nats, if measured."""


class Run(_Strict):
    """One call of `steermoe eval`."""

    format: Literal["steermoe-run"] = "steermoe-run"
    format_version: Literal[1] = 1
    created: Short
    model: Short
    revision: Short = ""
    settings: dict[str, Any] = {}
    """Limit, shots, chat template and the like."""
    versions: dict[Short, Short] = {}
    tasks: dict[Short, TaskRecord]
    profiles: list[ProfileRecord]
    requests: dict[Short, list[str]] = {}
    """Task -> what was asked, without template; for judges, where responses were kept."""
    judges: dict[Short, Any] = {}
    """Metric -> who judged it."""

    @model_validator(mode="after")
    def _complete(self) -> Run:
        names = [profile.name for profile in self.profiles]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"profiles must be there and have different names, got {names}")
        for task, asked in self.requests.items():
            if task not in self.tasks or len(asked) != self.tasks[task].examples:
                raise ValueError(f"requests of {task!r} are not those of a task of the run")
        for profile in self.profiles:
            if set(profile.outcomes) != set(self.tasks):
                raise ValueError(f"profile {profile.name!r} has not the tasks of the run")
            for task, record in self.tasks.items():
                if set(profile.outcomes[task]) != set(record.metrics):
                    raise ValueError(f"profile {profile.name!r}, task {task!r} has not the metrics of the run")
                lengths = {len(values) for values in profile.outcomes[task].values()}
                lengths |= {len(profile.responses[task])} if task in profile.responses else set()
                if lengths != {record.examples}:
                    raise ValueError(
                        f"profile {profile.name!r}, task {task!r}: {lengths} values, not {record.examples}"
                    )
        return self

    def profile(self, name: str) -> ProfileRecord:
        """The profile of that name.

        Raises:
            ComparisonError: there is none.
        """
        for profile in self.profiles:
            if profile.name == name:
                return profile
        known = ", ".join(repr(profile.name) for profile in self.profiles)
        raise ComparisonError(f"the run has no profile {name!r}; it has {known}")


def write_run(run: Run, path: Path) -> None:
    """Write a run; an existing file is replaced at once or not at all."""
    text = json.dumps(run.model_dump(mode="json"), separators=(",", ":")) + "\n"
    write_atomic(path, text.encode(), overwrite=True)


def read_json(path: Path) -> Any:
    """The JSON value in a file of bounded size.

    Raises:
        ComparisonError: it is none.
    """
    try:
        value = parse_json(read_data(path, MAX_BYTES), str(path))
    except DataError as error:
        value = error
    if isinstance(value, DataError):
        raise ComparisonError(str(value))
    return value


def parse_run(value: Any, name: str) -> Run:
    """A run from its JSON value.

    Raises:
        ComparisonError: it is not one; the first thing that is wrong is named.
    """
    try:
        return Run.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])[:200] or "file"
        raise ComparisonError(f"{name} is not a run of `steermoe eval`: {where}: {first['msg'][:300]}") from None
