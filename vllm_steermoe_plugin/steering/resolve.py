"""From what a request asks for to the one profile that the engine applies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from expert_registry.errors import RequestError
from expert_registry.ranking import RankedExpert
from expert_registry.registry import Found
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.steering.profile import SteeringProfile
from vllm_steermoe_plugin.steering.request import Named, SteeringRequest
from vllm_steermoe_plugin.steering.rules import check_rules
from vllm_steermoe_plugin.steering.selection import select_experts


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
    """Look up, select, merge and check; None if the request asks for no steering.

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
        parts = [_resolve_named(part, models, shape, registry, base_model) for part in request.named]
        merged = SteeringProfile.merge([part.profile for part in (*parts, *loaded)])
        resolved = Resolved(merged, tuple(source for part in (*parts, *loaded) for source in part.sources))
    check_rules(resolved.profile, shape)
    return resolved


def _resolve_named(
    part: Named, models: Sequence[str], shape: MoEShape, registry: RankingSource, base_model: str | None
) -> Resolved:
    found = registry.find(models, part.behaviour, version=part.version, shape=shape, base_model=base_model)
    card = found.ranking.card
    numbers = card.recommended_reverse if part.reverse and card.recommended_reverse else card.recommended
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
