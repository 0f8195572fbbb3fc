"""`steermoe judge`: let models judge the texts of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def judge(
    run: Annotated[Path, typer.Argument(help="File of `steermoe eval`; the judgements are added to it.")],
    safety: Annotated[
        str | None, typer.Option(help="A Llama-Guard-3 as MODEL@URL, such as name@http://127.0.0.1:8000/v1.")
    ] = None,
    fluency: Annotated[str | None, typer.Option(help="Any chat model as MODEL@URL.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="File of answers, so that none is asked twice; default: beside the run.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Questions at once.", min=1, max=256)] = 16,
) -> None:
    """Have an OpenAI-compatible server judge safety and fluency. An interrupted pass goes on from its cache."""
    from dataclasses import replace

    from lm_eval_tasks.compare.lm_eval_files import read_any_run
    from lm_eval_tasks.compare.run_file import write_run
    from lm_eval_tasks.errors import JudgeError
    from lm_eval_tasks.judging.client import AnswerCache, JudgeServer
    from lm_eval_tasks.judging.judges import judge_fluency, judge_safety

    if safety is None and fluency is None:
        raise JudgeError("name a judge with --safety or --fluency")
    servers = [
        None if text is None else replace(JudgeServer.parse(text), workers=workers) for text in (safety, fluency)
    ]
    judged = read_any_run(run)
    answers = AnswerCache.open(cache or run.with_suffix(".judged.jsonl"))
    for server, function in zip(servers, (judge_safety, judge_fluency), strict=True):
        if server is not None:
            judged = function(judged, server, answers)
            write_run(judged, run)
    typer.echo(json.dumps(judged.judges, indent=1))
