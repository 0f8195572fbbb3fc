"""Several steerings of one model in one engine, on the same tasks: the work behind `steermoe eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from expert_registry.errors import UsageError, one_of
from expert_registry.shape import MoEShape
from lm_eval_tasks import TASKS
from lm_eval_tasks.compare.lm_eval_files import run_of
from lm_eval_tasks.compare.pairing import merge_runs
from lm_eval_tasks.compare.run_file import ProfileRecord, Run
from lm_eval_tasks.errors import ComparisonError
from vllm_steermoe_plugin.detection.rows import DataError
from vllm_steermoe_plugin.steering.control import random_control
from vllm_steermoe_plugin.steering.profile import SteeringProfile

OURS = "steermoe_"
MAX_DRAWS = 1000


class Steerable(Protocol):
    """An lm-eval model whose steering can be changed, such as `SteerMoEVLLM`."""

    @property
    def shape(self) -> MoEShape: ...

    def use_steering(self, steer: object = None, **args: object) -> None: ...

    def get_model_info(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Steering:
    """One profile to measure; `of` as in `ProfileRecord`."""

    name: str
    text: str
    kind: Literal["none", "steered", "random"] = "steered"
    of: str | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """How the tasks are run; equal for all profiles.

    Attributes:
        limit: documents per task, the first ones; None for all.
        chat_template: whether prompts go through the model's chat template.
        responses: whether generated texts are kept.
        include_path: a folder with further tasks.
        metadata: as lm-eval's `--metadata`.
        samples: task -> indices of the documents to use; goes without `limit`.
    """

    limit: int | None = None
    chat_template: bool = True
    responses: bool = True
    include_path: str | None = None
    metadata: dict[str, Any] | None = None
    samples: dict[str, list[int]] | None = None


def split_profiles(text: str) -> list[str]:
    """Profiles separated by commas; those inside braces belong to an expert set.

    Raises:
        UsageError: there is none, or one stands twice.
    """
    parts, depth = [""], 0
    for char in text:
        depth += {"{": 1, "}": -1}.get(char, 0)
        if char == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += char
    profiles = [part.strip() for part in parts if part.strip()]
    twice = next((name for name in profiles if profiles.count(name) > 1), None)
    if not profiles or twice is not None:
        raise UsageError(f"profiles {text!r:.80}: " + (f"{twice!r:.80} stands twice" if twice else "none is named"))
    return profiles


def steerings(profiles: Sequence[str], model: Steerable, draws: int = 0) -> list[Steering]:
    """The profiles, then for each that steers `draws` of its `random_control`.

    All are set once, so that what cannot be applied fails before any task.

    Raises:
        SteerMoEError: a profile cannot be read, found or applied.
    """
    if not 0 <= draws <= MAX_DRAWS:
        raise UsageError(f"{draws} draws of random experts; from 0 to {MAX_DRAWS} are possible")
    named: list[Steering] = []
    random: list[Steering] = []
    for name in profiles:
        model.use_steering(name)
        info = model.get_model_info()["steermoe"]
        named.append(Steering(name, name, "none" if info["profile"] is None else "steered"))
        if info["profile"] is None or not draws:
            continue
        steered = SteeringProfile.from_json(info["profile"])
        for seed in range(draws):
            random.append(random_steering(name, steered, model.shape, seed))
    return named + random


def random_steering(name: str, profile: SteeringProfile, shape: MoEShape, seed: int) -> Steering:
    """A draw of the random control of the profile called `name`."""
    drawn = random_control(profile, shape, seed)
    return Steering(f"random {seed} like {name}", drawn.to_json(), "random", name)


def task_manager(tasks: Sequence[str], options: Options) -> Any:
    """lm-eval's TaskManager; its own tasks are indexed, which takes many seconds, only where one may be meant.

    Raises:
        DataError: a task, group or tag that does not exist.
    """
    from lm_eval.tasks import TaskManager

    folders = [str(TASKS), *([options.include_path] if options.include_path else [])]
    manager = TaskManager(
        include_path=folders,
        include_defaults=not all(task.startswith(OURS) for task in tasks) and not options.include_path,
        metadata=options.metadata,
    )
    for task in tasks:
        if task not in manager.all_tasks:
            ours = [name for name in manager.all_tasks if name.startswith(OURS)]
            raise DataError(one_of(task, ours, "task"))
    return manager


def controls_among(manager: Any, tasks: Sequence[str]) -> list[str]:
    """Those of tasks and groups that say that they are controls."""
    loaded = manager.load(list(tasks))["tasks"]
    return [name for name, task in loaded.items() if (task.config.metadata or {}).get("control")]


def evaluate(
    model: Any,
    plan: Sequence[Steering],
    tasks: Sequence[str],
    options: Options | None = None,
    *,
    done: Run | None = None,
    revision: str = "",
    each: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Measure all of `plan` and return one run.

    Args:
        model: a `Steerable` that lm-eval can run.
        plan: from `steerings`.
        tasks: names of tasks or groups.
        options: how.
        done: an earlier run to continue; profiles that it has with the same digest are not measured again.
        revision: what identifies the weights.
        each: called with the run so far whenever a profile is finished.

    Raises:
        ComparisonError: `done` does not pair with what is measured now.
        SteerMoEError: a profile or a task cannot be had.
    """
    chosen = options or Options()
    manager = task_manager(tasks, chosen)
    run = done
    for steering in plan:
        model.use_steering(steering.text)
        digest = model.get_model_info()["steermoe"]["digest"]
        known = None if run is None else next((p for p in run.profiles if p.name == steering.name), None)
        if known is not None and known.steering.get("digest") == digest:
            continue
        if known is not None:
            raise ComparisonError(f"the run to continue has {steering.name!r} with other experts; give another --out")
        found = measure(model, steering, tasks, manager, chosen).model_copy(update={"revision": revision})
        run = found if run is None else merge_runs([run, found])
        each(run)
    if run is None:
        raise UsageError("no profile was named")
    return run


def measure(model: Any, steering: Steering, tasks: Sequence[str], manager: Any, options: Options) -> Run:
    """One profile, already set, on some tasks."""
    import lm_eval

    results = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        limit=options.limit,
        samples=options.samples,
        apply_chat_template=options.chat_template,
        fewshot_as_multiturn=options.chat_template,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    run = run_of(results, options.responses)
    (profile,) = run.profiles
    updated = ProfileRecord(
        name=steering.name,
        kind=steering.kind,
        of=steering.of,
        steering=profile.steering,
        outcomes=profile.outcomes,
        responses=profile.responses,
    )
    return run.model_copy(update={"profiles": [updated]})
