"""`steermoe tune`: how many experts of a ranking to steer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from vllm_steermoe_plugin.steering.profile import Phase
    from vllm_steermoe_plugin.steering.request import Named


def tune(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or steermoe-lab.")],
    behaviour: Annotated[str, typer.Option(help="Behaviour, or behaviour@version.")],
    tasks: Annotated[str, typer.Option(help="Tasks whose metric to maximise, separated by commas.")],
    controls: Annotated[str, typer.Option(help="Control tasks, separated by commas.")] = "",
    test_tasks: Annotated[
        str, typer.Option(help="Held-out tasks and controls; default: the other half of the documents.")
    ] = "",
    out: Annotated[Path, typer.Option(help="Folder for log, result, plots; resumes from a log there.")] = Path("tuned"),
    reverse: Annotated[bool, typer.Option(help="Steer away from the behaviour.")] = False,
    phases: Annotated[str, typer.Option(help="Phases to consider, separated by commas.")] = "both",
    most: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Largest numbers to activate and deactivate; default: all that the ranking has."),
    ] = None,
    budget: Annotated[int, typer.Option(help="How many settings to try.", min=1)] = 40,
    margin: Annotated[float, typer.Option(help="Non-inferiority margin for controls; 0.03 is three points.")] = 0.03,
    chat_template: Annotated[bool, typer.Option(help="Apply the model's chat template.")] = True,
    publish: Annotated[bool, typer.Option(help="Store the numbers as a new version in your registry.")] = False,
    plot: Annotated[bool, typer.Option(help="Write the plots (needs matplotlib).")] = True,
    engine_args: Annotated[str, typer.Option(help="JSON object of arguments for vllm.LLM.")] = "{}",
) -> None:
    """Tune expert counts: maximise the target metric subject to non-inferiority on controls.

    The result is reported on held-out documents.
    """
    from vllm_steermoe_plugin.cli.inputs import check_writable, json_object, need

    need("lm_eval", "eval")
    if plot:
        need("matplotlib", "plot")
    from expert_registry import Registry
    from expert_registry.errors import UsageError
    from lm_eval_tasks.cli.show import print_comparison
    from lm_eval_tasks.evaluation import Options, task_manager
    from lm_eval_tasks.tuning import run as tune_run
    from lm_eval_tasks.tuning.log import TuneLog
    from lm_eval_tasks.tuning.result import print_front, store
    from vllm_steermoe_plugin.compat.versions import tool_versions
    from vllm_steermoe_plugin.models.checkpoints import fingerprint_of, names_of, resolve_checkpoint

    named = _one_behaviour(behaviour)
    gains, held, wanted = _names(tasks), _names(controls), _phases(phases)
    if not wanted or not gains:
        raise UsageError("--tasks and --phases name nothing")
    engine = json_object(engine_args, "--engine-args")
    found = Registry.default().find(
        names_of(resolve_checkpoint(model), [model]), named.behaviour, version=named.version
    )
    manager = task_manager([*gains, *held, *_names(test_tasks)], Options())
    tuning, test = ({}, {}) if test_tasks else tune_run.split_documents(manager, [*gains, *held])
    possible = tune_run.largest_numbers(found.ranking, reverse)
    goal = tune_run.Goal(
        behaviour=named.behaviour,
        reverse=reverse,
        tasks=tuple(gains),
        controls=tuple(held),
        margin=margin,
        phases=wanted,
        most=(min(possible[0], most[0]), min(possible[1], most[1])) if most else possible,
        budget=budget,
    )
    check_writable(out / "log.jsonl")
    header = {
        "model": model,
        "ranking": found.entry.name,
        "sha256": found.sha256,
        "reverse": reverse,
        "tasks": gains,
        "controls": held,
        "split": bool(tuning),
        "chat_template": chat_template,
        "files": fingerprint_of(Path(resolve_checkpoint(model))),
        "versions": tool_versions(),
        "engine_args": engine,
    }
    log = TuneLog.open(out / "log.jsonl", header)

    from lm_eval_tasks.models.in_process import SteerMoEVLLM

    steered = SteerMoEVLLM(pretrained=model, **engine)
    tried = tune_run.run_search(
        steered,
        goal,
        found,
        Options(chat_template=chat_template, responses=False, samples=tuning or None),
        log,
        lambda one: typer.echo(f"{one.setting}  gain {one.gain:+.3f}  control {one.control:+.3f}", err=True),
    )
    chosen = print_front(tried, goal.margin)
    if chosen is None:
        store(out, goal, found, tried, None, None, plot=plot)
        raise UsageError(f"no setting gained anything with the controls held; all {len(tried)} are in {out}")
    judged = _names(test_tasks) or [*gains, *held]
    options = Options(chat_template=chat_template, responses=False, samples=test or None)
    run, comparison = tune_run.judge(steered, goal, found, chosen.setting, judged, options)
    print_comparison(comparison)
    store(out, goal, found, tried, run, comparison, plot=plot)
    typer.echo(json.dumps({"request": goal.text(found, chosen.setting), "out": str(out)}))
    if publish:
        from expert_registry.registry import publish as publish_ranking
        from expert_registry.registry import user_folder

        ranking = tune_run.new_version(found, goal, chosen.setting, comparison, Registry.default())
        typer.echo(str(publish_ranking(ranking, user_folder())))


def _one_behaviour(text: str) -> Named:
    from expert_registry.errors import UsageError
    from vllm_steermoe_plugin.steering.request import parse_request

    request = parse_request(text)
    if len(request.named) != 1 or request.profiles or text.strip().partition(":")[1]:
        raise UsageError(f"--behaviour {text!r:.80}: name one behaviour, such as digits or digits@2")
    return request.named[0]


def _phases(text: str) -> tuple[Phase, ...]:
    from expert_registry.errors import UsageError, one_of
    from vllm_steermoe_plugin.steering.profile import PHASES

    wanted = _names(text)
    for phase in wanted:
        if phase not in PHASES:
            raise UsageError(one_of(phase, PHASES, "phase"))
    return cast("tuple[Phase, ...]", tuple(wanted))


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
