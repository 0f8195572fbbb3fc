"""Random prompts and expert sets for engines with the tiny checkpoints."""

from __future__ import annotations

import json
import random
from typing import Any

from expert_registry.shape import MoEShape
from tests.support.oracle import Rules
from tests.support.tiny import VOCABULARY

BIASES = (0.5, -0.75, 1.5, -3.0)


def random_rules(shape: MoEShape, seed: int) -> Rules:
    """A few rules in every layer, within what each layer allows, biases among them."""
    draw = random.Random(seed)
    rules: Rules = {}
    for layer in shape.layers:
        experts = draw.sample(range(shape.num_experts), shape.num_experts)
        activated = draw.randint(0, shape.top_k)
        deactivated = draw.randint(0, min(3, shape.num_experts - shape.top_k))
        rules |= {(layer, e): 1 for e in experts[:activated]}
        rules |= {(layer, e): -1 for e in experts[activated : activated + deactivated]}
        rules |= {(layer, e): draw.choice(BIASES) for e in experts[activated + deactivated :][: draw.randint(0, 4)]}
    return rules or {(shape.layers[0], 0): 1}


def as_text(rules: Rules) -> str:
    """The explicit expert set as JSON, in the interface's own words."""
    value: dict[str, dict[str, Any]] = {"activate": {}, "deactivate": {}, "bias": {}}
    for (layer, expert), rule in rules.items():
        if rule in (1, -1):
            value["activate" if rule > 0 else "deactivate"].setdefault(str(layer), []).append(expert)
        else:
            value["bias"].setdefault(str(layer), {})[str(expert)] = rule
    return json.dumps(value)


def prompt(seed: int, length: int = 24) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(2, VOCABULARY) for _ in range(length)]
