"""What a search may try: numbers of experts to force, or a strength of biases; and the order in which it does."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from expert_registry import Ranking
from expert_registry.weights import Score
from vllm_steermoe_plugin.steering.profile import Phase, SteeringProfile
from vllm_steermoe_plugin.steering.request import Named
from vllm_steermoe_plugin.steering.selection import select_experts
from vllm_steermoe_plugin.steering.strength import bias_experts

NEAREST = 1.15
"""Strengths, and numbers of experts that get biases, are not tried closer to each other than by this factor."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of experts to force, and the tokens to steer."""

    activate: int
    deactivate: int
    phase: Phase = "both"

    @property
    def effort(self) -> tuple[float, ...]:
        """Smaller is less steering; any number of forced experts is more than any strength."""
        return (1, self.activate + self.deactivate, self.activate)

    @property
    def label(self) -> str:
        return f"{self.activate}/{self.deactivate}"

    def named(self, behaviour: str, version: int | None, reverse: bool) -> Named:
        """The request for it."""
        return Named(behaviour, version, reverse, self.activate, self.deactivate, self.phase)

    def profile(self, ranking: Ranking, reverse: bool) -> SteeringProfile:
        """The experts that the request means."""
        return select_experts(
            ranking, activate=self.activate, deactivate=self.deactivate, reverse=reverse, phase=self.phase
        ).profile

    def __str__(self) -> str:
        return f"activate={self.activate} deactivate={self.deactivate} phase={self.phase}"


@dataclass(frozen=True, slots=True)
class Dial:
    """A strength of biases, the experts that get them, and the tokens to steer.

    Attributes:
        strength: above 0, also in a search that steers away from the behaviour.
        top: only the largest weights; None: all.
        by: what the weights are made of; None: as the ranking has it.
    """

    strength: float
    top: int | None = None
    by: Score | None = None
    phase: Phase = "both"

    @property
    def effort(self) -> tuple[float, ...]:
        return (0, self.strength, math.inf if self.top is None else self.top)

    @property
    def label(self) -> str:
        return " ".join(
            [f"s={self.strength:g}", *([f"top={self.top}"] if self.top else []), *([self.by] if self.by else [])]
        )

    @property
    def group(self) -> Dial:
        """What all strengths of one dose-response curve share."""
        return replace(self, strength=0.0)

    def named(self, behaviour: str, version: int | None, reverse: bool) -> Named:
        """The request for it."""
        strength = self._signed(reverse)
        return Named(behaviour, version, phase=self.phase, strength=strength, top=self.top, by=self.by)

    def profile(self, ranking: Ranking, reverse: bool) -> SteeringProfile:
        """The biases that the request means."""
        return bias_experts(ranking, self._signed(reverse), top=self.top, by=self.by, phase=self.phase)

    def _signed(self, reverse: bool) -> float:
        return -self.strength if reverse else self.strength

    def __str__(self) -> str:
        return f"strength={self.strength:g} top={self.top or 'all'} by={self.by or 'default'} phase={self.phase}"


Setting = Counts | Dial


@dataclass(frozen=True, slots=True)
class CountSpace:
    """Numbers of experts: a coarse grid over both, then midpoints to the nearest numbers that were tried.

    Attributes:
        activate: the largest number.
        deactivate: the largest number.
        phases: to consider; the grid uses the first.
    """

    activate: int
    deactivate: int
    phases: tuple[Phase, ...]

    def grid(self) -> list[Setting]:
        """From few experts to many."""
        pairs = [(a, d) for a in _coarse(self.activate) for d in _coarse(self.deactivate) if a + d]
        return [Counts(a, d, self.phases[0]) for a, d in sorted(pairs, key=sum)]

    def around(self, best: Setting, tried: Collection[Setting]) -> Iterator[Setting]:
        """What lies next to `best`, of those that are numbers of experts."""
        if not isinstance(best, Counts):
            return
        yield from (replace(best, phase=phase) for phase in self.phases)
        mine = [one for one in tried if isinstance(one, Counts)]
        for value in _midpoints(best.activate, {one.activate for one in mine}, self.activate):
            yield replace(best, activate=value)
        for value in _midpoints(best.deactivate, {one.deactivate for one in mine}, self.deactivate):
            yield replace(best, deactivate=value)


@dataclass(frozen=True, slots=True)
class DialSpace:
    """Strengths: those given, beside each number of experts given, then geometric midpoints to the nearest tried.

    Attributes:
        strengths: ascending, above 0.
        tops: ascending; None, for all, is the last.
        scores: what weights may be made of.
        experts: how many have a weight.
        phases: to consider; the grid uses the first.
    """

    strengths: tuple[float, ...]
    tops: tuple[int | None, ...]
    scores: tuple[Score | None, ...]
    experts: int
    phases: tuple[Phase, ...]

    def grid(self) -> list[Setting]:
        """From small strengths to large ones."""
        return [
            Dial(strength, top, by, self.phases[0])
            for strength in self.strengths
            for top in self.tops
            for by in self.scores
        ]

    def around(self, best: Setting, tried: Collection[Setting]) -> Iterator[Setting]:
        """What lies next to `best`, of those that are strengths; below the smallest one tried, half of it."""
        if not isinstance(best, Dial):
            return
        yield from (replace(best, phase=phase) for phase in self.phases)
        mine = [one for one in tried if isinstance(one, Dial)]
        known = {one.strength for one in mine}
        for strength in _between(best.strength, known | {min(known) / 4}):
            yield replace(best, strength=strength)
        if len(self.tops) > 1:
            at, tops = best.top or self.experts, {one.top or self.experts for one in mine}
            for top in map(round, _between(at, tops)):
                yield replace(best, top=top if top < self.experts else None)


Space = CountSpace | DialSpace


def levels(most: int) -> list[int]:
    """0, 1, 2, 4, ... up to `most`, which is the last."""
    found = [0]
    step = 1
    while step < most:
        found.append(step)
        step *= 2
    return [*found, most] if most else found


def _coarse(most: int) -> list[int]:
    """Every second level, and the last."""
    every = levels(most)
    return sorted({*every[::2], every[-1]})


def _nearest(at: float, known: Iterable[float]) -> Sequence[float]:
    """The next below and above, where there are any."""
    below = [value for value in known if value < at]
    above = [value for value in known if value > at]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


def _midpoints(at: int, known: Collection[int], most: int) -> Iterator[int]:
    for other in map(int, _nearest(at, known)):
        # The neighbour itself may have been tried only beside another number.
        yield from {(at + other) // 2, other} - {at}
    if at < most and at == max(known):
        yield most


def _between(at: float, known: Collection[float]) -> Iterator[float]:
    """Geometric midpoints to the nearest known values, in three digits."""
    for other in _nearest(at, known):
        if max(at, other) / min(at, other) > NEAREST**2:
            yield float(f"{math.sqrt(at * other):.3g}")
