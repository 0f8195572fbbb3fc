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

if TYPE_CHECKING:
    from vllm_steermoe_plugin.detection.pairs import PairSet
    from vllm_steermoe_plugin.detection.recipes.recipe import Behaviour


_MOST_NOTES = 1000
"""Characters that a detection adds to a behaviour's note, at most."""


def detection_card(
    model: ModelRef, shape: MoEShape, behaviour: Behaviour, data: DataRef, span: str, notes: Sequence[str]
) -> RankingCard:
    """The card, of today; `notes` follow the behaviour's own."""
    return RankingCard(
        model=model,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        behaviour=behaviour.name,
        version=behaviour.version,
        sides=behaviour.sides,
        data=data,
        span=span,
        safety=behaviour.safety,
        recommended=behaviour.recommended,
        tools=tool_versions(),
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
        license=behaviour.license,
        note=" ".join([behaviour.note, *notes] if behaviour.note else notes),
    )


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
        data = DataRef(name=pairs.name, sha256=pairs.sha256, pairs=len(pairs.pairs))
        model = ModelRef(id=model_id, architecture="any")
        check_card_size(detection_card(model, shape, behaviour, data, pairs.rule, [_MOST_NOTES * "x"]))
    except RankingFormatError as error:
        raise UsageError(f"a ranking card cannot hold what describes {behaviour.name}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if field == "id":
            field = "the model's name"
        raise UsageError(f"a ranking card cannot hold {field} {first['input']!r:.80}: {first['msg']}") from None
