"""EasySteer's JSON of router steering, read into a profile.

    {"layer_configs": {"3": {"mode": "soft", "expert_ids": [5, 7], "lambda": 0.7},
                       "4": {"mode": "activate", "expert_ids": [1], "deactivate_ids": [2], "epsilon": 0.01}}}

`soft` adds lambda times the sample deviation of a token's E logits, our biases are in population deviations.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

from expert_registry.errors import UsageError, one_of
from vllm_steermoe_plugin.steering.biases import MAX_BIAS
from vllm_steermoe_plugin.steering.profile import MAX_TEXT, SteeringProfile

EPSILON = 0.01
"""By how much EasySteer, and we, put an activated expert above the others."""
_ALL = "layer_configs"
_FORCED_KEYS = ("mode", "expert_ids", "activate_ids", "deactivate_ids", "epsilon")
_KEYS = {"soft": ("mode", "expert_ids", "lambda"), "activate": _FORCED_KEYS, "deactivate": _FORCED_KEYS}
"""Of a layer, by its mode."""
_BY_VERSION = "what it computes differs between versions of EasySteer"
_REFUSED = {
    "boost": _BY_VERSION,
    "suppress": _BY_VERSION,
    "soft_hard": _BY_VERSION,
    "steermoe": _BY_VERSION,
    "soft_random": "it draws experts for each token",
    "soft_topk": "it depends on the top-k that a token has by itself, and a bias does not",
}
_LAYER = re.compile(r"0|[1-9][0-9]{0,4}")


def to_population(num_experts: int) -> float:
    """Sample deviations of E numbers in population deviations."""
    return math.sqrt(num_experts / (num_experts - 1))


def read_easysteer(text: str, num_experts: int) -> SteeringProfile:
    """The profile that steers as the file does.

    Args:
        text: of the file.
        num_experts: E of the model, at least 2.

    Raises:
        UsageError: it is not that JSON, or says what no profile can; the message says where.
        ProfileError: an expert both ways, or a bias out of bounds.
    """
    layers = _layers(text)
    activate: set[tuple[int, int]] = set()
    deactivate: set[tuple[int, int]] = set()
    biases: list[tuple[int, int, float]] = []
    for key, value in layers.items():
        if not _LAYER.fullmatch(key):
            raise UsageError(f"{key!r:.80} is not a layer index in decimal digits")
        layer, config = int(key), _config(key, value)
        ids = {name: _ids(key, config, name, num_experts) for name in config if name.endswith("_ids")}
        if config["mode"] == "soft":
            bias = _lambda(key, config) * to_population(num_experts)
            biases += [(layer, expert, bias) for expert in ids.get("expert_ids", [])]
        else:
            _check_epsilon(key, config)
            for verb, forced in (("activate", activate), ("deactivate", deactivate)):
                by_mode = ids.get("expert_ids", []) if config["mode"] == verb else []
                both = by_mode + ids.get(f"{verb}_ids", [])
                if len(set(both)) < len(both):
                    raise UsageError(f"layer {key}: an expert stands in expert_ids and in {verb}_ids")
                forced |= {(layer, expert) for expert in both}
        if not ids:
            raise UsageError(f"layer {key} names no experts")
    return SteeringProfile(frozenset(activate), frozenset(deactivate), bias=tuple(biases))


def _layers(text: str) -> dict[str, object]:
    if len(text) > MAX_TEXT:
        raise UsageError(f"EasySteer's file has {len(text)} characters; at most {MAX_TEXT} are read")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(f"EasySteer's file is not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get(_ALL), dict) or not value[_ALL]:
        raise UsageError(f"EasySteer's file is an object whose {_ALL!r} maps layers to what is done there")
    unknown = sorted(value.keys() - {_ALL})
    if unknown:
        raise UsageError(one_of(unknown[0], [_ALL], "key"))
    layers: dict[str, object] = value[_ALL]
    return layers


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise UsageError("a key stands twice in EasySteer's file")
    return result


def _constant(name: str) -> float:
    raise UsageError(f"{name} in EasySteer's file is not a finite number")


def _config(key: str, value: object) -> dict[str, object]:
    """What a layer says, with a mode that can be converted and no keys but those of the mode."""
    mode = value.get("mode") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(mode, str):
        raise UsageError(f"layer {key} must be an object with a mode, got {value!r:.80}")
    if mode in _REFUSED:
        raise UsageError(f"layer {key}: mode {mode} cannot be converted: {_REFUSED[mode]}")
    if mode not in _KEYS:
        raise UsageError(f"layer {key}: {one_of(mode, _KEYS, 'mode')}")
    for name in value:
        if mode == "soft" and name in _FORCED_KEYS and name not in _KEYS[mode]:
            raise UsageError(f"layer {key}: EasySteer ignores {name} in mode soft; take it out")
        if name not in _KEYS[mode]:
            raise UsageError(f"layer {key}: {one_of(name, _KEYS[mode], f'key in mode {mode}')}")
    return value


def _ids(key: str, value: Mapping[str, object], name: str, num_experts: int) -> list[int]:
    ids = value[name]
    if not isinstance(ids, list) or not ids:
        raise UsageError(f"layer {key}: {name} must be a list of experts, not empty, got {ids!r:.80}")
    for expert in ids:
        if type(expert) is not int or not 0 <= expert < num_experts:
            raise UsageError(f"layer {key}: {name}: {expert!r:.80} is not one of {num_experts} experts, counted from 0")
    if len(set(ids)) < len(ids):
        raise UsageError(f"layer {key}: an expert stands twice in {name}")
    return ids


def _lambda(key: str, value: Mapping[str, object]) -> float:
    if "lambda" not in value:
        raise UsageError(f"layer {key}: without lambda, the strength is that of EasySteer's request; write a lambda")
    number = value["lambda"]
    if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= MAX_BIAS:
        raise UsageError(f"layer {key}: lambda must be a number from -{MAX_BIAS} to {MAX_BIAS}, got {number!r:.80}")
    return float(number)


def _check_epsilon(key: str, value: Mapping[str, object]) -> None:
    if value.get("epsilon", EPSILON) != EPSILON:
        raise UsageError(f"layer {key}: epsilon is {EPSILON} here and cannot be {value['epsilon']!r:.80}")
