"""Dose-response: what each strength of the same steering does, from its reverse through none to too much.

A curve is found in a comparison by its profiles' requests: the same behaviour, experts, weights and phase at several
strengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from expert_registry.errors import ProfileError, RequestError
from lm_eval_tasks.compare.comparison import Comparison
from lm_eval_tasks.compare.intervals import Interval, mean_of, mean_over_changes
from lm_eval_tasks.compare.run_file import ProfileRecord
from vllm_steermoe_plugin.steering.request import Named, lists_experts, parse_request

DIVERGENCE = "KL divergence (nats)"
"""Where a task has its name."""


@dataclass(frozen=True, slots=True)
class Response:
    """One task's main metric, or the divergence, under one profile.

    Attributes:
        value: of the metric.
        change: against the baseline, paired by example; of the divergence, itself.
        random: the changes under each random control.
    """

    task: str
    profile: str
    value: float
    change: Interval
    random: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Dose:
    """All responses to one strength; None for forced experts."""

    strength: float | None
    away: bool
    responses: tuple[Response, ...]

    @property
    def label(self) -> str:
        if self.strength is not None:
            return f"{self.strength:g}"
        return "forced, reverse" if self.away else "forced"


@dataclass(frozen=True, slots=True)
class Curve:
    """Doses by strength; forced experts stand at the ends."""

    name: str
    doses: tuple[Dose, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A profile and what its request was for: a curve, and a strength or forced experts."""

    profile: ProfileRecord
    named: Named
    strength: float | None

    @property
    def behaviour(self) -> tuple[object, ...]:
        return self.named.behaviour, self.named.version, self.named.phase

    @property
    def curve(self) -> str:
        return Named(
            self.named.behaviour, self.named.version, phase=self.named.phase, top=self.named.top, by=self.named.by
        ).text()


def curves(comparison: Comparison) -> list[Curve]:
    """One for each steering that was compared at two strengths or more."""
    asked = [one for profile in comparison.run.profiles if (one := _asked(profile)) is not None]
    found = []
    for name in dict.fromkeys(one.curve for one in asked if one.strength is not None):
        strong = [one for one in asked if one.strength is not None and one.curve == name]
        if len(strong) < 2:
            continue
        forced = [one for one in asked if one.strength is None and one.behaviour == strong[0].behaviour]
        doses = [_dose(comparison, one) for one in (*strong, *forced)]
        if comparison.run.profile(comparison.baseline).kind == "none":
            doses.append(_none(comparison, strong[0].profile))
        found.append(Curve(name, tuple(sorted(doses, key=_place))))
    return found


def _asked(profile: ProfileRecord) -> _Asked | None:
    """None for what has no place on a curve: no single behaviour, other numbers of experts than recommended."""
    text = profile.steering.get("request")
    if profile.kind != "steered" or not isinstance(text, str) or lists_experts(text):
        return None
    try:
        request = parse_request(text)
    except (RequestError, ProfileError):
        # A file may come from another version, with another grammar.
        return None
    if len(request.named) != 1 or request.profiles:
        return None
    (named,) = request.named
    if named.strength is not None:
        return _Asked(profile, named, named.strength)
    # A behaviour for which its ranking recommends a strength.
    source = next(iter(profile.steering.get("sources") or []), None)
    if isinstance(source, dict) and source.get("strength") is not None:
        named = Named(named.behaviour, named.version, phase=named.phase, top=source.get("top"), by=source.get("by"))
        return _Asked(profile, named, source["strength"])
    return _Asked(profile, named, None) if named.activate is None and named.deactivate is None else None


def _place(dose: Dose) -> float:
    beyond = -float("inf") if dose.away else float("inf")
    return beyond if dose.strength is None else dose.strength


def _dose(comparison: Comparison, one: _Asked) -> Dose:
    away = one.named.away if one.strength is None else one.strength < 0
    return Dose(one.strength, away, (*_metrics(comparison, one.profile), *_divergence(comparison, one.profile)))


def _none(comparison: Comparison, beside: ProfileRecord) -> Dose:
    """The unsteered model as a strength of 0, with what `beside` has."""
    changes = [change for change in comparison.changes if change.profile == beside.name and change.main]
    responses = [(change.task, change.before.value, change.before.n) for change in changes]
    responses += [(DIVERGENCE, 0.0, len(beside.divergence))] if beside.divergence else []
    name = comparison.baseline
    return Dose(
        0.0, False, tuple(Response(task, name, value, Interval(0.0, 0.0, 0.0, n), ()) for task, value, n in responses)
    )


def _metrics(comparison: Comparison, profile: ProfileRecord) -> Iterator[Response]:
    random = {one.task: one.changes for one in comparison.random if one.profile == profile.name}
    for change in comparison.changes:
        if change.profile == profile.name and change.main:
            yield Response(change.task, profile.name, change.after.value, change.change, random.get(change.task, ()))


def _divergence(comparison: Comparison, profile: ProfileRecord) -> Iterator[Response]:
    if profile.divergence:
        draws = [one for one in comparison.run.profiles if one.kind == "random" and one.of == profile.name]
        random = tuple(sum(one.divergence) / len(one.divergence) for one in draws if one.divergence)
        mean = mean_of(profile.divergence)
        yield Response(DIVERGENCE, profile.name, mean.value, mean, random)


def table_rows(curve: Curve) -> list[list[str]]:
    """For a table: one row for each task and strength."""
    found = []
    for task in dict.fromkeys(one.task for dose in curve.doses for one in dose.responses):
        scale, form = (1.0, ".4f") if task == DIVERGENCE else (100.0, ".1f")
        for dose in curve.doses:
            for one in dose.responses:
                if one.task == task:
                    found.append([task, dose.label, *_cells(one, scale, form)])
    return found


HEAD = ["task", "strength", "value", "change", "random: mean", "random: range", "draws"]


def _cells(one: Response, scale: float, form: str) -> Sequence[str]:
    change = ", ".join(f"{scale * bound:+{form}}" for bound in (one.change.low, one.change.high))
    cells = [f"{scale * one.value:{form}}", f"{scale * one.change.value:+{form}} [{change}]"]
    if not one.random:
        return [*cells, "", "", "0"]
    mean = mean_over_changes(one.random)
    ends = " to ".join(f"{scale * end:+{form}}" for end in (min(one.random), max(one.random)))
    around = ", ".join(f"{scale * bound:+{form}}" for bound in (mean.low, mean.high))
    return [*cells, f"{scale * mean.value:+{form}} [{around}]", ends, str(len(one.random))]
