"""`steermoe attribute`: a text coloured by which side its tokens' experts belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from expert_registry import read_ranking
from expert_registry.errors import UsageError


def attribute(
    ranking: Annotated[Path, typer.Argument(help="Ranking file.")],
    text: Annotated[str | None, typer.Option(help="A plain text.")] = None,
    file: Annotated[Path | None, typer.Option(help="File with a plain text.")] = None,
    prompt: Annotated[str | None, typer.Option(help="User message (chat).")] = None,
    answer: Annotated[str | None, typer.Option(help="Assistant message (with --prompt).")] = None,
    model: Annotated[str | None, typer.Option(help="Hub id, folder, or steermoe-lab; default: the ranking's.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Use only the top N experts.")] = None,
    html: Annotated[Path | None, typer.Option(help="HTML file to write.")] = None,
    engine_args: Annotated[str, typer.Option(help="JSON object of arguments for vllm.LLM.")] = "{}",
) -> None:
    """Colour a text token by token by the risk difference of the experts that its router selects."""
    from vllm_steermoe_plugin.cli.inputs import check_writable, json_object
    from vllm_steermoe_plugin.detection.attribution import attribute as run
    from vllm_steermoe_plugin.detection.engine_client import COUNT_GROUPS
    from vllm_steermoe_plugin.detection.pairs import ChatMessage
    from vllm_steermoe_plugin.engine import start_engine
    from vllm_steermoe_plugin.views.attribution import attribution_html, attribution_text

    if sum(given is not None for given in (text, file, prompt)) != 1 or (answer is not None and prompt is None):
        raise UsageError("give one of --text, --file and --prompt; --answer goes with --prompt")
    if file is not None:
        try:
            # Line ends as they stand: they are tokens like any other.
            text = file.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {file}: {error}") from None
    for name, given in (("--text", text), ("--prompt", prompt), ("--answer", answer)):
        try:
            (given or "").encode()
        except UnicodeEncodeError:
            raise UsageError(f"{name} is not UTF-8") from None
    if html is not None:
        check_writable(html)
    found = read_ranking(ranking)
    arguments = json_object(engine_args)
    chat = [] if prompt is None else [ChatMessage(role="user", content=prompt)]
    if answer is not None:
        chat.append(ChatMessage(role="assistant", content=answer))
    engine = start_engine(model or found.card.model.id, {"count_groups": COUNT_GROUPS}, **arguments)
    tokens = run(engine, found, chat if text is None else text, top)
    console = Console()
    console.print(attribution_text(tokens), soft_wrap=True)
    sides = found.card.sides
    Console(stderr=True).print(f"red: {sides[0]}; blue: {sides[1]}", markup=False, highlight=False)
    if console.color_system is None and html is None:
        Console(stderr=True).print("colours are not shown here; --html FILE keeps them")
    if html is not None:
        html.write_text(attribution_html(tokens, found), encoding="utf-8", newline="")
        Console(stderr=True).print(str(html), markup=False, highlight=False)
