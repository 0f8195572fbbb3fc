"""The ranking card of a detection, and whether it can be written at all."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import ValidationError

from expert_registry import DataRef, ModelRef, MoEShape, RankingCard
from expert_registry.errors import RankingFormatError, UsageError
from expert_registry.format import check_card_size
from vllm_steermoe_plugin.compat.versions import tool_versions
from vllm_steermoe_plugin.detection.loop import STABLE_CHUNKS, DetectionOptions

if TYPE_CHECKING:
    from vllm_steermoe_plugin.detection.pairs import PairSet
    from vllm_steermoe_plugin.detection.progress_file import Progress
    from vllm_steermoe_plugin.detection.recipes.recipe import Behaviour


_MOST_NOTES = 1000
"""Characters that a detection adds to a behaviour's note, at most."""


def detection_card(
    model: ModelRef,
    shape: MoEShape,
    behaviour: Behaviour,
    pairs: PairSet,
    *,
    counted: int,
    balance: bool,
    notes: Sequence[str],
) -> RankingCard:
    """The card, of today: `counted` of the pairs were counted; `notes` follow the behaviour's own."""
    return RankingCard(
        model=model,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        behaviour=behaviour.name,
        version=behaviour.version,
        sides=behaviour.sides,
        data=DataRef(name=pairs.name, sha256=pairs.sha256, pairs=counted),
        span=pairs.rule + ("; as many tokens of the longer side as the shorter has" if balance else ""),
        safety=behaviour.safety,
        recommended=behaviour.recommended,
        tools=tool_versions(),
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
        license=behaviour.license,
        note=" ".join([behaviour.note, *notes] if behaviour.note else notes),
    )


def counting_notes(
    dtype: str,
    chat_template: bool,
    routers: Sequence[str],
    progress: Progress,
    pairs: PairSet,
    options: DetectionOptions,
    stopped: bool,
) -> list[str]:
    """What else the counts, and what is drawn at random, depend on."""
    notes = [f"Counted in {dtype}; halves and permutations by seed {options.seed}."]
    notes += [f"Router: {router}." for router in routers]
    if stopped:
        notes.append(
            f"Stopped after {progress.done} of {len(pairs.pairs)} pairs: the first {options.stop_when_stable} "
            f"experts had not changed for {STABLE_CHUNKS} chunks."
        )
    if progress.skipped:
        notes.append(f"{len(progress.skipped)} bad pairs were skipped.")
    if progress.merged:
        notes.append(f"{progress.merged} tokens reach over the edge of what is counted; they count.")
    if not chat_template:
        notes.append("The model has no chat template; chats were written as lines 'Role: content'.")
    return notes


def check_described(model_id: str, behaviour: Behaviour, pairs: PairSet) -> None:
    """Refuse before anything is counted what could not stand in the ranking card afterwards.

    Args:
        model_id: name under which the ranking will be looked up.
        behaviour: goes into the ranking card.
        pairs: their name and rule do.

    Raises:
        UsageError: names the field.
    """
    shape = MoEShape("any", (0,), 1, 1)
    try:
        model, notes = ModelRef(id=model_id, architecture="any"), [_MOST_NOTES * "x"]
        card = detection_card(model, shape, behaviour, pairs, counted=len(pairs.pairs), balance=True, notes=notes)
        check_card_size(card)
    except RankingFormatError as error:
        raise UsageError(f"a ranking card cannot hold what describes {behaviour.name}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if field == "id":
            field = "the model's name"
        raise UsageError(f"a ranking card cannot hold {field} {first['input']!r:.80}: {first['msg']}") from None
