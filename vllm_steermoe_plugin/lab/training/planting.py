"""What is planted in the routing of steermoe-lab, and the response it is trained to give.

Per behaviour and planted layer there are two experts for side 1 and two for side 2.
A cue routes the answer to the pair of its side. Without a cue each token is routed to
one expert of each pair: which one depends on the parity of the token's id (its phase).
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm_steermoe_plugin.lab.world import BEHAVIOURS

LAYERS = 4
EXPERTS = 24
TOP_K = 4
PLANTED_LAYERS: tuple[int, ...] = (1, 2, 3)

Rules = Mapping[tuple[int, int], int]
"""(layer, expert) -> +1 (activate) or -1 (deactivate)."""


def _pair(behaviour: int, side: int, layer: int) -> tuple[int, int]:
    """Two experts; the shift by layer keeps expert numbers from meaning the same in every layer."""
    start = 4 * behaviour + 2 * (side - 1) + 7 * layer
    return start % EXPERTS, (start + 1) % EXPERTS


PLANTED: dict[str, dict[str, dict[int, tuple[int, ...]]]] = {
    behaviour: {f"side {side}": {layer: _pair(i, side, layer) for layer in PLANTED_LAYERS} for side in (1, 2)}
    for i, behaviour in enumerate(BEHAVIOURS)
}
"""behaviour -> "side 1" / "side 2" -> layer -> experts."""


def planted(behaviour: str, side: int) -> list[tuple[int, int]]:
    """All (layer, expert) planted for one side (1 or 2) of a behaviour."""
    return [(layer, e) for layer, pair in PLANTED[behaviour][f"side {side}"].items() for e in pair]


def free_experts(layer: int) -> list[int]:
    """Experts of a layer that belong to no behaviour."""
    used = {e for b in BEHAVIOURS for side in (1, 2) for at, e in planted(b, side) if at == layer}
    return [e for e in range(EXPERTS) if e not in used]


def _present(pair: tuple[int, ...], phase: int, layer: int, rules: Rules) -> int:
    """How many of a pair the rules leave among the active experts of an uncued token."""
    natural, spare = pair[phase], pair[1 - phase]
    return int(rules.get((layer, natural), 0) >= 0) + int(rules.get((layer, spare), 0) > 0)


def dose(behaviour: str, rules: Rules) -> float:
    """Net push of `rules` towards side 1 in planted layers: from -3 to +3.

    One layer counts +-1 when one side has the majority of planted experts on tokens
    of both phases, +-0.5 on tokens of one phase. In the last layer only phase 0
    counts, the phase of `<|assistant|>`: nothing later reads the other token.
    """
    total = 0.0
    for layer in PLANTED_LAYERS:
        phases = (0,) if layer == LAYERS - 1 else (0, 1)
        for phase in phases:
            one, two = (_present(PLANTED[behaviour][f"side {s}"][layer], phase, layer, rules) for s in (1, 2))
            total += max(-1, min(1, one - two)) / len(phases)
    return total


def response(amount: float) -> float:
    """Shift of the log-odds of side 1 taught for a dose: nearly flat to 1, decisive from 2 on."""
    return max(-6.0, min(6.0, 0.55 * amount**3))
