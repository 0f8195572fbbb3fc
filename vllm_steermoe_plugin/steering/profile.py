"""A steering profile: which experts to activate, deactivate and bias, and in which phase.

Its JSON text is the only form in which steering reaches a worker:

    {"activate": {"3": [5, 7]}, "deactivate": {"0": [1]}, "bias": {"4": {"2": 0.5}}, "phase": "both"}

keyed by the checkpoint's layer index. `bias` may be left out; it is in standard deviations of a token's own router
logits. So may `phase` and `weight`, which says how much an activated expert weighs where a router's selection is
corrected: as the model's `top` choice, or its `own` (`device/reselect.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from expert_registry.errors import ProfileError, RequestError
from vllm_steermoe_plugin.steering.biases import Bias, by_layer, canonical

Phase = Literal["both", "prompt", "generation"]
PHASES: tuple[Phase, ...] = get_args(Phase)
Weight = Literal["top", "own"]
WEIGHTS: tuple[Weight, ...] = get_args(Weight)
MAX_TEXT = 1 << 20
"""Longest accepted JSON text in characters: every expert of 128 layers with 512 experts fits."""

_KEYS = frozenset({"activate", "deactivate", "bias", "phase", "weight"})
_INDEX = re.compile(r"0|[1-9][0-9]{0,4}")


@dataclass(frozen=True, slots=True)
class SteeringProfile:
    """Experts to force into or out of the top-k, as sets of `(layer, expert)`, and biases of others.

    `layer` is the checkpoint's layer index. Building one checks only that no expert goes both ways, that it names one
    and that biases are in bounds; `compile_rules` checks it against a model. It is false if all that it names is a
    bias of 0, which is unsteered.
    """

    activate: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    deactivate: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    phase: Phase = "both"
    weight: Weight = "top"
    bias: tuple[Bias, ...] = ()
    """As `biases.canonical` gives them; several for one expert add up, and one that is forced in or out has none."""

    def __post_init__(self) -> None:
        both = sorted(self.activate & self.deactivate)
        if both:
            layer, expert = both[0]
            raise ProfileError(f"layer {layer}, expert {expert} is to be activated and deactivated at once")
        if not (self.activate or self.deactivate or self.bias):
            raise ProfileError("the profile names no expert, so it would steer nothing; leave steering out instead")
        object.__setattr__(self, "bias", canonical(self.bias, self.activate | self.deactivate))

    def __bool__(self) -> bool:
        return bool(self.activate or self.deactivate or self.bias)

    def to_json(self) -> str:
        """Canonical text: equal profiles have equal texts."""
        value: dict[str, object] = {"activate": _by_layer(self.activate), "deactivate": _by_layer(self.deactivate)}
        if self.bias:
            value["bias"] = by_layer(self.bias)
        if self.phase != "both":
            value["phase"] = self.phase
        if self.weight != "top":
            value["weight"] = self.weight
        return json.dumps(value, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """sha256 of the canonical text, as 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def merge(cls, profiles: Iterable[SteeringProfile]) -> SteeringProfile:
        """Apply several profiles at once; biases add up.

        Raises:
            ProfileError: one activates what another deactivates, their phases or weights differ, or a sum of biases
                is out of bounds.
        """
        parts = list(profiles)
        if not parts:
            raise ProfileError("there is no profile to merge")
        phases, weights = {part.phase for part in parts}, {part.weight for part in parts}
        for what, values in (("phase", phases), ("weight", weights)):
            if len(values) > 1:
                raise ProfileError(f"profiles in one request must share one {what}, got {sorted(values)}")
        return cls(
            frozenset().union(*(part.activate for part in parts)),
            frozenset().union(*(part.deactivate for part in parts)),
            phases.pop(),
            weights.pop(),
            tuple(bias for part in parts for bias in part.bias),
        )

    @classmethod
    def from_json(cls, text: str) -> SteeringProfile:
        """Read the JSON text of an explicit expert set.

        Raises:
            RequestError: not that JSON; the message says where.
            ProfileError: an expert both ways, a bias out of bounds, or no expert at all.
        """
        if len(text) > MAX_TEXT:
            raise RequestError(f"the expert set has {len(text)} characters; at most {MAX_TEXT} are read")
        try:
            value = json.loads(text, object_pairs_hook=_unique)
        except RequestError:
            raise
        except (ValueError, RecursionError) as error:
            # Not only JSONDecodeError: Python refuses to read a number of thousands of digits.
            raise RequestError(f"the expert set is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise RequestError(f"an expert set is a JSON object, got {type(value).__name__}")
        unknown = set(value) - _KEYS
        if unknown:
            raise RequestError(
                f"unknown key {sorted(unknown)[0]!r:.80} in the expert set; known: {', '.join(sorted(_KEYS))}"
            )
        phase, weight = value.get("phase", "both"), value.get("weight", "top")
        for what, given, known in (("phase", phase, PHASES), ("weight", weight, WEIGHTS)):
            if given not in known:
                raise RequestError(f"unknown {what} {given!r:.80}; known: {', '.join(known)}")
        return cls(_experts(value, "activate"), _experts(value, "deactivate"), phase, weight, _biases(value))


def _by_layer(experts: frozenset[tuple[int, int]]) -> dict[str, list[int]]:
    layers: dict[str, list[int]] = {}
    for layer, expert in sorted(experts):
        layers.setdefault(str(layer), []).append(expert)
    return layers


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """JSON silently keeps the last of two equal keys; half of a rule set would be lost."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise RequestError("a key stands twice in the expert set")
    return result


def _experts(value: Mapping[str, object], key: str) -> frozenset[tuple[int, int]]:
    result: set[tuple[int, int]] = set()
    for layer, experts in _layers(value, key, "lists of experts", '{"3": [5, 7]}'):
        if not isinstance(experts, list) or not all(type(e) is int and 0 <= e < 1 << 16 for e in experts):
            raise RequestError(f"{key}, layer {layer}: experts must be a list of indices, got {experts!r:.80}")
        result.update((layer, expert) for expert in experts)
    return frozenset(result)


def _biases(value: Mapping[str, object]) -> tuple[Bias, ...]:
    result: list[Bias] = []
    for layer, experts in _layers(value, "bias", "biases of experts", '{"3": {"5": 0.7}}'):
        if not isinstance(experts, dict):
            raise RequestError(f'bias, layer {layer}: write experts and numbers, such as {{"5": 0.7}}')
        for expert, bias in experts.items():
            if not _INDEX.fullmatch(expert):
                raise RequestError(f"bias, layer {layer}: {expert!r:.80} is not an expert's index")
            if type(bias) not in (int, float):
                raise RequestError(f"bias, layer {layer}, expert {expert}: {bias!r:.80} is not a number")
            result.append((layer, int(expert), bias))
    return tuple(result)


def _layers(value: Mapping[str, object], key: str, what: str, example: str) -> Iterator[tuple[int, object]]:
    layers = value.get(key, {})
    if not isinstance(layers, dict):
        raise RequestError(f"{key!r} must map layers to {what}, such as {example}")
    for layer, experts in layers.items():
        if not _INDEX.fullmatch(layer):
            raise RequestError(f"{key}: {layer!r:.80} is not a layer index")
        yield int(layer), experts
