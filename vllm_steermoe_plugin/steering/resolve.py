"""From what a request asks for to the one profile that the engine applies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from expert_registry.errors import RequestError
from expert_registry.ranking import RankedExpert
from expert_registry.registry import Found
from expert_registry.shape import MoEShape
from expert_registry.weights import Score
from vllm_steermoe_plugin.steering.profile import SteeringProfile
from vllm_steermoe_plugin.steering.request import Named, SteeringRequest
from vllm_steermoe_plugin.steering.rules import check_rules
from vllm_steermoe_plugin.steering.selection import select_experts
from vllm_steermoe_plugin.steering.strength import bias_experts


class RankingSource(Protocol):
    """Where rankings are found: a `Registry`, or those that a server has used so far."""

    def find(
        self,
        models: Sequence[str],
        behaviour: str,
        *,
        version: int | None = None,
        shape: MoEShape | None = None,
        base_model: str | None = None,
    ) -> Found:
        """See `Registry.find`."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a part of a profile came from: enough to make it again."""

    ranking: str
    """`model/behaviour@version`."""
    sha256: str
    reverse: bool
    activate: int
    deactivate: int
    dropped: tuple[RankedExpert, ...]
    strength: float | None = None
    """Of biases in place of forced experts, of which there are none then."""
    top: int | None = None
    by: Score | None = None

    def to_dict(self) -> dict[str, object]:
        """For JSON, but for the direction, which each answer says in words of its own."""
        return {
            "ranking": self.ranking,
            "sha256": self.sha256,
            "activate": self.activate,
            "deactivate": self.deactivate,
            "dropped": [[expert.layer, expert.expert] for expert in self.dropped],
            "strength": self.strength,
            "top": self.top,
            "by": self.by,
        }


@dataclass(frozen=True, slots=True)
class Resolved:
    """A checked profile and its sources (none for an explicit expert set)."""

    profile: SteeringProfile
    sources: tuple[Source, ...]
    text: str = field(init=False, compare=False, repr=False)
    """The profile's canonical JSON, written once: each request carries it."""
    digest: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", self.profile.to_json())
        object.__setattr__(self, "digest", self.profile.digest)


def resolve(
    request: SteeringRequest,
    models: Sequence[str],
    shape: MoEShape,
    registry: RankingSource,
    base_model: str | None = None,
    loaded: Sequence[Resolved] = (),
) -> Resolved | None:
    """Look up, select, merge and check; None if the request asks for no steering, or for strength 0.

    Args:
        request: as parsed.
        models: names of the served model, for the registry.
        shape: of the served model; the profile is checked against it, so that errors come here.
        registry: where rankings are, or those that a server has used so far.
        base_model: of which the served model is a fine-tune, and whose rankings may be used as well.
        loaded: the profiles that `request.profiles` names, in that order.

    Raises:
        UnknownRankingError, RankingFormatError, ProfileError: see those who raise them.
    """
    if not request:
        return None
    if request.explicit is not None:
        resolved = Resolved(request.explicit, ())
    else:
        if len(loaded) != len(request.profiles):
            raise RequestError(f"{len(request.profiles)} loaded profiles are named, but {len(loaded)} are there")
        named = [_resolve_named(part, models, shape, registry, base_model) for part in request.named]
        parts = [part for part in (*named, *loaded) if part.profile]
        if not parts:
            return None
        merged = SteeringProfile.merge([part.profile for part in parts])
        resolved = Resolved(merged, tuple(source for part in parts for source in part.sources))
        if not merged:
            return None
    check_rules(resolved.profile, shape)
    return resolved


def _resolve_named(
    part: Named, models: Sequence[str], shape: MoEShape, registry: RankingSource, base_model: str | None
) -> Resolved:
    found = registry.find(models, part.behaviour, version=part.version, shape=shape, base_model=base_model)
    card = found.ranking.card
    numbers = card.recommended_reverse if part.reverse and card.recommended_reverse else card.recommended
    strength, top, by = part.strength, part.top, part.by
    if strength is None and numbers.strength is not None and part.activate is None and part.deactivate is None:
        strength, top, by = (-1 if part.reverse else 1) * numbers.strength, numbers.top, numbers.by
    if strength is not None:
        profile = bias_experts(found.ranking, strength, top=top, by=by, phase=part.phase)
        away = strength < 0
        return Resolved(profile, (Source(found.entry.name, found.sha256, away, 0, 0, (), strength, top, by),))
    activate = numbers.activate if part.activate is None else part.activate
    deactivate = numbers.deactivate if part.deactivate is None else part.deactivate
    selection = select_experts(
        found.ranking,
        activate=activate,
        deactivate=deactivate,
        reverse=part.reverse,
        phase=part.phase,
        weight=part.weight,
    )
    source = Source(found.entry.name, found.sha256, part.reverse, activate, deactivate, selection.dropped)
    return Resolved(selection.profile, (source,))
