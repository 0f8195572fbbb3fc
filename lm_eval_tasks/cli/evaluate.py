"""`steermoe eval`: one engine, several steerings, one file, one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id, folder, or steermoe-lab.")],
    profiles: Annotated[
        str, typer.Option(help="Steering expressions, separated by commas, such as none,digits,digits:reverse.")
    ],
    tasks: Annotated[str, typer.Option(help="Tasks or groups, separated by commas.")],
    out: Annotated[Path, typer.Option(help="File to write: outcomes of every example.")] = Path("steermoe-run.json"),
    report: Annotated[Path | None, typer.Option(help="Folder for the report.")] = None,
    random: Annotated[int, typer.Option(help="Number of random-expert controls per profile.", min=0)] = 0,
    kl_prompts: Annotated[
        str,
        typer.Option(
            help="Also the KL divergence from the unsteered model, after prompts of a file or of the controls."
        ),
    ] = "",
    limit: Annotated[int | None, typer.Option(help="Documents per task, the first ones.", min=1)] = None,
    margin: Annotated[float, typer.Option(help="Non-inferiority margin for controls; 0.03 is three points.")] = 0.03,
    chat_template: Annotated[bool, typer.Option(help="Apply the model's chat template.")] = True,
    responses: Annotated[bool, typer.Option(help="Keep the generated texts in the file; judges need them.")] = True,
    resume: Annotated[bool, typer.Option(help="Continue the run in --out.")] = False,
    plot: Annotated[bool, typer.Option(help="Write the report's plot (needs matplotlib).")] = True,
    include_path: Annotated[str | None, typer.Option(help="Folder with further tasks.")] = None,
    metadata: Annotated[str, typer.Option(help="JSON object, as lm-eval's --metadata.")] = "{}",
    engine_args: Annotated[str, typer.Option(help="JSON object of arguments for vllm.LLM.")] = "{}",
) -> None:
    """Evaluate a model under several steering profiles and compare against the unsteered baseline."""
    from vllm_steermoe_plugin.cli.inputs import check_writable, json_object, need

    need("lm_eval", "eval")
    check_writable(out)
    if report is not None:
        check_writable(report / "report.json")
        if plot:
            need("matplotlib", "plot")
    from lm_eval_tasks import evaluation
    from lm_eval_tasks.cli.show import print_comparison
    from lm_eval_tasks.compare.comparison import compare
    from lm_eval_tasks.compare.lm_eval_files import read_any_run
    from lm_eval_tasks.compare.report import write_report
    from lm_eval_tasks.compare.run_file import Run, write_run
    from lm_eval_tasks.divergence import prompt_source, with_divergences
    from lm_eval_tasks.errors import ComparisonError
    from vllm_steermoe_plugin.models.checkpoints import revision_of

    names = evaluation.split_profiles(profiles)
    chosen = [task.strip() for task in tasks.split(",") if task.strip()]
    if out.exists() and not resume:
        raise ComparisonError(f"{out} exists; continue it with --resume or give another --out")
    options = evaluation.Options(
        limit=limit,
        chat_template=chat_template,
        responses=responses,
        include_path=include_path,
        metadata=json_object(metadata, "--metadata"),
    )
    engine = json_object(engine_args, "--engine-args")
    # Before the engine: what is misspelt should cost no start.
    manager = evaluation.task_manager(chosen, options)
    source = prompt_source(kl_prompts, evaluation.controls_among(manager, chosen))
    done = read_any_run(out) if resume and out.exists() else None

    from lm_eval_tasks.models.in_process import SteerMoEVLLM

    steered = SteerMoEVLLM(pretrained=model, **engine)
    revision = revision_of(model)

    def keep(run: Run) -> None:
        write_run(run, out)
        typer.echo(f"{len(run.profiles)}/{len(plan)}  {run.profiles[-1].name}", err=True)

    plan = evaluation.steerings(names, steered, random)
    run = evaluation.evaluate(steered, plan, chosen, options, done=done, revision=revision, each=keep)
    if source:
        run = with_divergences(run, steered, plan, source.prompts(steered, manager, options))
    write_run(run, out)
    typer.echo(str(out))
    if len(run.profiles) > 1:
        comparison = compare(run, margin=margin)
        print_comparison(comparison)
        for path in write_report(comparison, report, plots=plot) if report is not None else ():
            typer.echo(str(path))
