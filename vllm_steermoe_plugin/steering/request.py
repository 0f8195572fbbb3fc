"""The text by which a request, a model argument or the command line names its steering.

    faithfulness                     the newest ranking, with its recommended numbers of experts
    faithfulness@2                   version 2 of it
    faithfulness:reverse             away from the behaviour
    faithfulness:activate=4:deactivate=0:phase=generation
    faithfulness:strength=0.5        biases in place of forced experts: half of the ranking's weights
    faithfulness:strength=-0.5       away from the behaviour; strength 0 steers nothing
    faithfulness:strength=1:top=200:by=log_ratio     the 200 largest weights, made of log ratios
    faithfulness:weight=own          activated experts keep their own weight (`device/reselect.py`)
    faithfulness+digits              two at once
    @terse                           a profile that the server's operator has loaded under that name
    @terse+digits                    likewise, with a behaviour on top
    {"activate": {"3": [5, 7]}}      an explicit expert set, also with "bias": {"4": {"2": 0.5}}
    none                             not steered

A loaded profile is taken as it is, so it has no options. There is no comma in the text,
because lm-eval splits `--model_args` at commas.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard, TypeVar

from expert_registry.card import SLUG
from expert_registry.errors import RequestError, one_of
from expert_registry.weights import SCORES, Score
from vllm_steermoe_plugin.steering.biases import MAX_BIAS
from vllm_steermoe_plugin.steering.profile import MAX_TEXT, PHASES, WEIGHTS, Phase, SteeringProfile, Weight

T = TypeVar("T", bound=str)
NONE = "none"
MAX_PARTS = 16
_NAME = re.compile(rf"({SLUG})(?:@([1-9][0-9]{{0,5}}|latest))?")
PROFILE_NAME = re.compile(SLUG)
"""Names under which an operator may load a profile."""
_NUMBER = re.compile(r"0|[1-9][0-9]{0,5}")
_STRENGTH = re.compile(r"-?[0-9]{0,2}\.?[0-9]{0,6}")
_DIRECTIONS = ("forward", "reverse")
_OPTIONS = (
    "activate=N",
    f"by={'|'.join(SCORES)}",
    "deactivate=N",
    "forward",
    "phase=PHASE",
    "reverse",
    "strength=X",
    "top=N",
    "weight=top|own",
)
_VALUED = tuple(option.partition("=")[0] for option in _OPTIONS if "=" in option)
_OF_FORCED = ("direction", "activate", "deactivate", "weight")
_OF_BIASES = ("top", "by")


@dataclass(frozen=True, slots=True)
class Named:
    """One behaviour of the registry, with what the request says about it."""

    behaviour: str
    version: int | None = None
    reverse: bool = False
    activate: int | None = None
    deactivate: int | None = None
    phase: Phase = "both"
    weight: Weight = "top"
    strength: float | None = None
    """Of biases in place of forced experts, from -16 to 16; negative away from the behaviour."""
    top: int | None = None
    """How many of the largest weights give biases; None: all."""
    by: Score | None = None
    """What the weights are made of; None: the ranking's own, else risk differences."""

    @property
    def away(self) -> bool:
        """Whether it steers away from the behaviour."""
        return self.reverse or (self.strength is not None and self.strength < 0)

    def text(self) -> str:
        """As it stands in a request."""
        version = "" if self.version is None else f"@{self.version}"
        options = [
            "reverse" if self.reverse else "",
            "" if self.activate is None else f"activate={self.activate}",
            "" if self.deactivate is None else f"deactivate={self.deactivate}",
            "" if self.phase == "both" else f"phase={self.phase}",
            "" if self.weight == "top" else f"weight={self.weight}",
            "" if self.strength is None else f"strength={self.strength:.6f}".rstrip("0").rstrip("."),
            "" if self.top is None else f"top={self.top}",
            "" if self.by is None else f"by={self.by}",
        ]
        return ":".join([self.behaviour + version, *filter(None, options)])


@dataclass(frozen=True, slots=True)
class SteeringRequest:
    """What a request asks for: behaviours and loaded profiles by name, or one explicit profile; else `none`."""

    named: tuple[Named, ...] = field(default=())
    explicit: SteeringProfile | None = None
    profiles: tuple[str, ...] = field(default=())
    """Names of loaded profiles, without the `@`."""

    def __bool__(self) -> bool:
        return bool(self.named or self.profiles) or self.explicit is not None

    def text(self) -> str:
        """The text that asks for this, in canonical form: equal requests have equal texts."""
        if self.explicit is not None:
            return self.explicit.to_json()
        return "+".join([*(part.text() for part in self.named), *(f"@{name}" for name in self.profiles)]) or NONE


def lists_experts(text: object) -> TypeGuard[str]:
    """Whether a steering expression is an explicit expert set, without parsing it."""
    return isinstance(text, str) and len(text) <= MAX_TEXT and text.lstrip().startswith("{")


def parse_request(text: object) -> SteeringRequest:
    """Parse a steering expression.

    Raises:
        RequestError: it is no string or breaks the grammar above; the message says how.
        ProfileError: an explicit set that contradicts itself.
    """
    if not isinstance(text, str):
        raise RequestError(f"`steermoe` must be a string, got {type(text).__name__}: {text!r:.80}")
    if len(text) > MAX_TEXT:
        raise RequestError(f"the steering expression has {len(text)} characters; at most {MAX_TEXT} are read")
    stripped = text.strip()
    if stripped.startswith("{"):
        # None: biases of 0 are unsteered.
        return SteeringRequest(explicit=SteeringProfile.from_json(stripped) or None)
    if stripped == NONE:
        return SteeringRequest()
    number = stripped.count("+") + 1
    if number > MAX_PARTS:
        raise RequestError(f"{number} parts in one request; at most {MAX_PARTS}")
    parts = [part.strip() for part in stripped.split("+")]
    profiles = tuple(_parse_profile(part) for part in parts if part.startswith("@"))
    named = tuple(_parse_named(part) for part in parts if not part.startswith("@"))
    names = [part.behaviour for part in named] + [f"@{name}" for name in profiles]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"{twice!r} stands twice in {stripped!r:.80}")
    return SteeringRequest(named=named, profiles=profiles)


def _parse_profile(part: str) -> str:
    name, colon, _ = part[1:].partition(":")
    if colon:
        raise RequestError(f"{part!r:.80}: a loaded profile is taken as it is; write @NAME, without options")
    if not PROFILE_NAME.fullmatch(name):
        raise RequestError(f"{part!r:.80} names no loaded profile; write @NAME, such as @terse")
    return name


def _parse_named(part: str) -> Named:
    head, *options = part.split(":")
    match = _NAME.fullmatch(head)
    if not match or match[1] == NONE:
        raise RequestError(
            f"{part!r:.80} is no steering request; write BEHAVIOUR[@VERSION][:OPTION...], @PROFILE, "
            f'a JSON expert set such as {{"activate": {{"3": [5]}}}}, or {NONE}'
        )
    values: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if option in _DIRECTIONS:
            key, value = "direction", option
        elif key not in _VALUED or not equals:
            raise RequestError(one_of(option, _OPTIONS, "steering option"))
        if key in values:
            raise RequestError(f"option {key!r} stands twice in {part!r:.80}")
        values[key] = value
    strength = _strength(values)
    contradiction = next((key for key in (_OF_BIASES if strength is None else _OF_FORCED) if key in values), None)
    if contradiction in _OF_BIASES:
        raise RequestError(f"{part!r:.80}: {contradiction}= says which biases there are; say their strength= as well")
    if contradiction is not None:
        what = values["direction"] if contradiction == "direction" else f"{contradiction}="
        raise RequestError(
            f"{part!r:.80}: {what} is about experts that are forced, strength= gives them biases in place of that; "
            "leave one out (a negative strength steers away from the behaviour)"
        )
    version = match[2]
    return Named(
        behaviour=match[1],
        version=int(version) if version and version != "latest" else None,
        reverse=values.get("direction") == "reverse",
        activate=_number(values, "activate"),
        deactivate=_number(values, "deactivate"),
        phase=_one_of(values, "phase", PHASES, "both"),
        weight=_one_of(values, "weight", WEIGHTS, "top"),
        strength=strength,
        top=_number(values, "top", least=1),
        by=_one_of(values, "by", SCORES, "risk_difference") if "by" in values else None,
    )


def _one_of(values: Mapping[str, str], key: str, known: Sequence[T], default: T) -> T:
    for value in known:
        if value == values.get(key, default):
            return value
    raise RequestError(one_of(values[key], known, key))


def _strength(values: Mapping[str, str]) -> float | None:
    text = values.get("strength")
    if text is None:
        return None
    if not _STRENGTH.fullmatch(text) or not any(character.isdigit() for character in text):
        raise RequestError(f"strength= needs a number such as 0.5 or -1, got {text!r:.40}")
    strength = float(text) or 0.0  # Not -0.
    if abs(strength) > MAX_BIAS:
        raise RequestError(f"strength={text}: a strength is from -{MAX_BIAS:g} to {MAX_BIAS:g}")
    return strength


def _number(values: Mapping[str, str], key: str, least: int = 0) -> int | None:
    if key not in values:
        return None
    if not _NUMBER.fullmatch(values[key]) or int(values[key]) < least:
        raise RequestError(f"{key}= needs a number of experts, got {values[key]!r:.40}")
    return int(values[key])
