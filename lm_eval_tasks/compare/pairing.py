"""Whether runs may be compared: same model, same documents, same prompts, same everything but the steering."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from lm_eval_tasks.compare.run_file import ProfileRecord, Run
from lm_eval_tasks.errors import ComparisonError


def merge_runs(runs: Sequence[Run], tasks: Collection[str] = (), other_versions: bool = False) -> Run:
    """All profiles in one run, in the order given.

    Args:
        runs: at least one.
        tasks: only these; none means all, which then must be the same in all runs.
        other_versions: whether the versions of the tools may differ.

    Raises:
        ComparisonError: the runs do not pair; all reasons are named.
    """
    narrowed = [_only(run, tasks) for run in runs]
    first, *others = narrowed
    reasons = [reason for other in others for reason in differences(first, other, other_versions)]
    if reasons:
        raise ComparisonError("the runs do not pair: " + "; ".join(dict.fromkeys(reasons)))
    profiles: list[ProfileRecord] = []
    names: dict[str, ProfileRecord] = {}
    for number, run in enumerate(narrowed, start=1):
        for profile in run.profiles:
            known = names.get(profile.name)
            if known is not None and known.outcomes == profile.outcomes:
                continue  # The same baseline in both files.
            renamed = f"{profile.name} (run {number})" if known is not None else profile.name
            profiles.append(profile.model_copy(update={"name": renamed}))
            names[renamed] = profile
    return first.model_copy(update={"profiles": profiles})


def differences(one: Run, other: Run, other_versions: bool = False) -> list[str]:
    """Why two runs do not pair, in words; empty if they do."""
    found = _unequal("model", one.model, other.model) + _unequal("weights", one.revision, other.revision)
    for key in sorted({*one.settings, *other.settings}):
        found += _unequal(f"setting {key!r}", one.settings.get(key), other.settings.get(key))
    if set(one.tasks) != set(other.tasks):
        missing = sorted(set(one.tasks) ^ set(other.tasks))
        found.append(f"only one of them has {', '.join(missing)} (--task restricts the comparison)")
    for task in sorted(set(one.tasks) & set(other.tasks)):
        mine, theirs = one.tasks[task], other.tasks[task]
        for field in type(mine).model_fields:
            found += _unequal(f"{task}: {field}", getattr(mine, field), getattr(theirs, field))
    for metric in sorted({*one.judges, *other.judges}):
        mine, theirs = (_judge(run.judges.get(metric)) for run in (one, other))
        found += _unequal(f"judge of {metric}", mine, theirs)
    if not other_versions:
        for name in sorted({*one.versions, *other.versions}):
            versions = one.versions.get(name), other.versions.get(name)
            found += [f"{each} (--other-versions allows it)" for each in _unequal(f"version of {name}", *versions)]
    return found


def _judge(value: Any) -> Any:
    """A judge without its findings."""
    return {key: value.get(key) for key in ("judge", "version", "method")} if isinstance(value, dict) else value


def _unequal(name: str, one: object, other: object) -> list[str]:
    return [] if one == other else [f"{name}: {one!r:.80} and {other!r:.80}"]


def _only(run: Run, tasks: Collection[str]) -> Run:
    if not tasks:
        return run
    missing = sorted(set(tasks) - set(run.tasks))
    if missing:
        raise ComparisonError(f"no task {', '.join(missing)} in a run; it has {', '.join(sorted(run.tasks))}")
    kept = [task for task in run.tasks if task in tasks]
    profiles = [
        profile.model_copy(
            update={
                "outcomes": {task: profile.outcomes[task] for task in kept},
                "responses": {task: texts for task, texts in profile.responses.items() if task in kept},
            }
        )
        for profile in run.profiles
    ]
    settings = dict(run.settings)
    if isinstance(settings.get("shots"), dict):
        settings["shots"] = {task: shots for task, shots in settings["shots"].items() if task in kept}
    return run.model_copy(
        update={
            "tasks": {task: run.tasks[task] for task in kept},
            "profiles": profiles,
            "settings": settings,
            "requests": {task: asked for task, asked in run.requests.items() if task in kept},
        }
    )
