"""`steermoe tune`: how many experts of a ranking to force, or how strongly to bias them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from expert_registry.registry import Found
    from lm_eval_tasks.compare.comparison import Comparison
    from lm_eval_tasks.divergence import PromptSource
    from lm_eval_tasks.tuning.log import TuneLog
    from lm_eval_tasks.tuning.run import Goal
    from lm_eval_tasks.tuning.settings import Setting
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
    strengths: Annotated[
        str, typer.Option(help="Strengths of biases to begin with, such as 0.25,0.5,1,2; --most adds forced experts.")
    ] = "",
    top: Annotated[str, typer.Option(help="Numbers of experts to bias, such as 50,200,all; default: all.")] = "",
    weights: Annotated[
        str, typer.Option(help="Weights to try: own, risk_difference, log_ratio, sign; default: as the ranking has it.")
    ] = "",
    random: Annotated[
        int, typer.Option(help="Random controls for each strength, of the best weights and number of experts.", min=0)
    ] = 0,
    kl_prompts: Annotated[
        str, typer.Option(help="File of prompts for the KL divergence, or controls, the default with --strengths.")
    ] = "",
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Largest mean KL divergence of the next token, in nats; default with --strengths: 0.03.", min=0
        ),
    ] = None,
    budget: Annotated[int, typer.Option(help="How many settings to try.", min=1)] = 40,
    margin: Annotated[float, typer.Option(help="Non-inferiority margin for controls; 0.03 is three points.")] = 0.03,
    chat_template: Annotated[bool, typer.Option(help="Apply the model's chat template.")] = True,
    publish: Annotated[bool, typer.Option(help="Store the result as a new version in your registry.")] = False,
    plot: Annotated[bool, typer.Option(help="Write the plots (needs matplotlib).")] = True,
    engine_args: Annotated[str, typer.Option(help="JSON object of arguments for vllm.LLM.")] = "{}",
) -> None:
    """Tune expert counts or strengths: maximise the target metric subject to limits on the controls.

    The result is reported on held-out documents.
    """
    from vllm_steermoe_plugin.cli.inputs import check_writable, json_object, need

    need("lm_eval", "eval")
    if plot:
        need("matplotlib", "plot")
    from expert_registry import Registry
    from expert_registry.errors import UsageError
    from lm_eval_tasks.cli.show import print_comparison
    from lm_eval_tasks.cli.tune_space import names_in, spaces_of
    from lm_eval_tasks.evaluation import Options, task_manager
    from lm_eval_tasks.tuning import result
    from lm_eval_tasks.tuning import run as tune_run
    from lm_eval_tasks.tuning.bench import Bench
    from lm_eval_tasks.tuning.search import Limits
    from vllm_steermoe_plugin.models.checkpoints import names_of, resolve_checkpoint

    named = _one_behaviour(behaviour)
    gains, held = names_in(tasks), names_in(controls)
    if not gains:
        raise UsageError("--tasks names nothing")
    engine = json_object(engine_args, "--engine-args")
    found = Registry.default().find(
        names_of(resolve_checkpoint(model), [model]), named.behaviour, version=named.version
    )
    spaces = spaces_of(found.ranking, reverse, phases, most, strengths, top, weights, random)
    source, limit = _divergence(kl_prompts, max_kl, bool(strengths), held)
    manager = task_manager([*gains, *held, *names_in(test_tasks)], Options())
    tuning, test = ({}, {}) if test_tasks else tune_run.split_documents(manager, [*gains, *held])
    goal = tune_run.Goal(
        behaviour=named.behaviour,
        reverse=reverse,
        tasks=tuple(gains),
        controls=tuple(held),
        limits=Limits(margin, limit),
        spaces=spaces,
        budget=budget,
        draws=random,
    )
    check_writable(out / "log.jsonl")
    searched = {
        "model": model,
        "reverse": reverse,
        "tasks": gains,
        "controls": held,
        "split": bool(tuning),
        "chat_template": chat_template,
        "prompts": source.identity,
        "engine_args": engine,
    }
    log = _open_log(out / "log.jsonl", model, found, searched)

    from lm_eval_tasks.models.in_process import SteerMoEVLLM

    steered = SteerMoEVLLM(pretrained=model, **engine)
    options = Options(chat_template=chat_template, responses=False, samples=tuning or None)
    bench = Bench(steered, [*gains, *held], manager, options, source.prompts(steered, manager, options), log)
    typer.echo(goal.cost(bench.documents, len(bench.prompts)), err=True)
    tried = tune_run.run_search(bench, goal, found, lambda one: typer.echo(str(one), err=True))
    chosen = result.print_front(tried, goal.limits)
    tune_run.sweep(bench, goal, found, tried, chosen)
    result.store_search(out, goal, bench.whole(), plot=plot)
    if chosen is None:
        result.store(out, goal, found, tried, None, None, plot=plot)
        raise UsageError(f"no setting gained anything with the controls held; all {len(tried)} are in {out}")
    judged = names_in(test_tasks) or [*gains, *held]
    options = Options(chat_template=chat_template, responses=False, samples=test or None)
    run, comparison = tune_run.judge(steered, goal, found, chosen.setting, judged, options)
    print_comparison(comparison)
    result.store(out, goal, found, tried, run, comparison, plot=plot)
    typer.echo(json.dumps({"request": goal.text(found, chosen.setting), "out": str(out)}))
    if publish:
        typer.echo(str(_publish(found, goal, chosen.setting, comparison)))


def _one_behaviour(text: str) -> Named:
    from expert_registry.errors import UsageError
    from vllm_steermoe_plugin.steering.request import parse_request

    request = parse_request(text)
    if len(request.named) != 1 or request.profiles or text.strip().partition(":")[1]:
        raise UsageError(f"--behaviour {text!r:.80}: name one behaviour, such as digits or digits@2")
    return request.named[0]


def _divergence(
    prompts: str, most: float | None, strengths: bool, controls: list[str]
) -> tuple[PromptSource, float | None]:
    """Where the prompts are from, and the limit; neither unless strengths or one of the two are asked for."""
    from expert_registry.errors import UsageError
    from lm_eval_tasks.divergence import CONTROLS, MAX_KL, prompt_source

    wanted = strengths or most is not None
    source = prompt_source(prompts or (CONTROLS if wanted and controls else ""), controls)
    if most is not None and not source:
        raise UsageError("--max-kl needs prompts: name --controls, or a file by --kl-prompts")
    return source, (MAX_KL if most is None else most) if source else None


def _open_log(path: Path, model: str, found: Found, searched: dict[str, Any]) -> TuneLog:
    from lm_eval_tasks.tuning.log import TuneLog
    from vllm_steermoe_plugin.compat.versions import tool_versions
    from vllm_steermoe_plugin.models.checkpoints import fingerprint_of, resolve_checkpoint

    files = fingerprint_of(Path(resolve_checkpoint(model)))
    ranking = {"ranking": found.entry.name, "sha256": found.sha256}
    return TuneLog.open(path, {**searched, **ranking, "files": files, "versions": tool_versions()})


def _publish(found: Found, goal: Goal, chosen: Setting, comparison: Comparison) -> Path:
    from expert_registry.registry import Registry, publish, user_folder
    from lm_eval_tasks.tuning.publishing import new_version

    return publish(new_version(found, goal, chosen, comparison, Registry.default()), user_folder())
