"""The next version of a ranking: the same counts, with other recommended numbers or weights of its own."""

from __future__ import annotations

from dataclasses import replace

from expert_registry.card import MAX_TEXT, RankingCard
from expert_registry.format import version_of
from expert_registry.ranking import Ranking
from expert_registry.registry import Registry


def revise(ranking: Ranking, registry: Registry, note: str, **changes: object) -> Ranking:
    """A ranking as its next version.

    Args:
        ranking: with the weights that the new version is to have.
        registry: whose versions it must not repeat.
        note: what was done, added to that of the card.
        changes: fields of the card.
    """
    card = ranking.card
    changes["version"] = max(registry.next_version(card.model.id, card.behaviour), card.version + 1)
    changes["note"] = f"{card.note} {note}".strip()[:MAX_TEXT]
    revised = replace(ranking, card=card.model_copy(update=changes))
    fields = revised.card.model_dump() | {"format_version": version_of(revised)}
    return replace(revised, card=RankingCard.model_validate(fields))
