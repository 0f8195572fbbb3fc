"""What steering costs a layer on a CPU at either seam: the rewrite at the gate, and the correction of a selection.

    python -m benchmarks.cost.seams [--rounds N] [--threads N]

Microseconds per layer, as a Markdown table; the fastest of rounds in which all take turns, since other load only adds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from vllm_steermoe_plugin.device.ops import reselect_, rewrite_
from vllm_steermoe_plugin.device.reselect import select
from vllm_steermoe_plugin.device.rewrite import forcing
from vllm_steermoe_plugin.device.router_kind import RouterKind
from vllm_steermoe_plugin.steering.rule_values import BIASES, FORCES

TOP_K = 8
ROUTERS = {
    "128, softmax": (128, RouterKind("softmax", renormalize=True)),
    "256, sigmoid + bias, 4 of 8 groups": (256, RouterKind("sigmoid", True, 8, 4, True, 2.5)),
}
STEPS = (1, 16, 512, 2048)
_PROFILES, _OF_A_KIND = 8, 4
"""Profiles, and experts that each activates, and deactivates."""
_LEAST_SECONDS = 0.002
"""That are timed at once."""


class Layer:
    """One layer's logits and selection; in it all tokens are steered, one, or none beside other layers."""

    def __init__(self, experts: int, kind: RouterKind, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.kind = kind
        self.logits = torch.randn((tokens, experts), generator=generator)
        self.bias = torch.randn(experts, generator=generator) * 0.1 if kind.bias else None
        weights, ids = select(self.logits, self.bias, kind, TOP_K)
        self.selected = weights, ids.int()
        order = torch.rand((_PROFILES + 1, 1, experts), generator=generator).argsort(-1)
        self.rules = forcing((order < _OF_A_KIND).int() - (order >= experts - _OF_A_KIND).int())
        self.rules[0] = 0
        self.biased = torch.where(self.rules == 0, 0.5, self.rules).half()
        self.biased[0] = 0
        everyone = torch.randint(1, _PROFILES + 1, (tokens,), generator=generator, dtype=torch.int32)
        nobody = torch.zeros_like(everyone)
        self.slots = {"all": everyone, "one": nobody.index_fill(0, torch.tensor([0]), 1), "none": nobody}

    def gate(self, who: str) -> None:
        """The rewrite of the logits."""
        rewrite_(self.logits, self.rules, self.slots[who], self._active(who), 0)

    def biases(self, who: str) -> None:
        """The rewrite with a bias for each expert that no rule forces."""
        rewrite_(self.logits, self.biased, self.slots[who], self._active(who, FORCES | BIASES), 0)

    def selection(self, who: str) -> None:
        """The correction of the selection."""
        kind = self.kind
        reselect_(
            *self.selected, self.logits, self.bias, self.rules, self.slots[who], self._active(who), 0, *kind.arguments
        )

    @staticmethod
    def _active(who: str, does: int = FORCES) -> torch.Tensor:
        return torch.tensor([does * (who != "none")], dtype=torch.uint8)


def measure(rounds: int, steps: tuple[int, ...] = STEPS) -> list[tuple[str, int, dict[str, float]]]:
    """Router, tokens, and microseconds by seam and who is steered."""
    found = []
    for name, (experts, kind) in ROUTERS.items():
        for tokens in steps:
            layer = Layer(experts, kind, tokens)
            works = {
                f"{seam.__name__}, {who}": partial(seam, who)
                for who in layer.slots
                for seam in (layer.gate, layer.biases, layer.selection)
            }
            found.append((name, tokens, fastest(works, rounds)))
    return found


def fastest(works: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Microseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            started, number = time.perf_counter(), 0
            while (taken := time.perf_counter() - started) < _LEAST_SECONDS or not number:
                work()
                number += 1
            times[name].append(1e6 * taken / number)
    return {name: min(each) for name, each in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rows = measure(asked.rounds)
    lines = [["experts", "tokens", *rows[0][2]], ["---"] * (2 + len(rows[0][2]))]
    lines += [[name, str(tokens), *(f"{x:.0f}" for x in times.values())] for name, tokens, times in rows]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))  # noqa: T201


if __name__ == "__main__":
    main()
