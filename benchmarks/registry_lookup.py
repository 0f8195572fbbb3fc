"""Time of a look-up in a warm registry of a thousand rankings. `python -m benchmarks.registry_lookup [RANKINGS]`

Each ranking has the shape of Qwen3-30B-A3B: 48 layers, 128 experts, top-8 (100 KB). Prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from expert_registry import DataRef, ModelRef, Ranking, RankingCard, Recommended, Registry, RoutingCounts
from expert_registry.errors import UnknownRankingError
from expert_registry.registry import publish

LAYERS, EXPERTS, TOP_K, TOKENS = 48, 128, 8, 100_000
BEHAVIOURS = ("faithfulness", "safety")
VERSIONS = 5
REPEATS = 300


def made_up(model: str, behaviour: str, version: int, rng: np.random.Generator) -> Ranking:
    """A ranking with some counts that are possible."""
    one_layer = np.repeat(np.arange(16) * (2 * TOKENS * TOP_K // (15 * EXPERTS)), EXPERTS // 16)
    one_layer[-1] += TOP_K * TOKENS - one_layer.sum()
    sides = [rng.permuted(np.tile(one_layer, (LAYERS, 1)), axis=1) for _ in range(2)]
    card = RankingCard(
        model=ModelRef(id=model, architecture="Qwen3MoeForCausalLM"),
        num_experts=EXPERTS,
        top_k=TOP_K,
        behaviour=behaviour,
        version=version,
        sides=("with", "without"),
        data=DataRef(name="made up"),
        span="none",
        recommended=Recommended(activate=0, deactivate=500),
        created="2026-01-01",
        license="CC0-1.0",
    )
    return Ranking(RoutingCounts(sides[0], sides[1], np.array([TOKENS, TOKENS]), np.arange(LAYERS)), card)


def milliseconds(action: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median and 95th percentile of an action's time, after one that is not counted."""
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(1000 * (time.perf_counter() - start))
    return {"median_ms": round(statistics.median(times), 3), "p95_ms": round(sorted(times)[int(0.95 * repeats)], 3)}


def unknown(registry: Registry) -> None:
    """A look-up that finds nothing and must say what there is."""
    try:
        registry.find(["nobody/nothing"], "faithfulness")
    except UnknownRankingError:
        return
    raise AssertionError("found what is not there")


def ranked(registry: Registry) -> int:
    """A look-up and the order of all experts, as a request needs it the first time."""
    return len(registry.find(["Org/Model-7"], "safe").ranking.experts())


def main(rankings: int) -> dict[str, object]:
    rng = np.random.default_rng(0)
    models = max(1, rankings // (len(BEHAVIOURS) * VERSIONS))
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number in track(range(models), "write", console=console, disable=not console.is_terminal):
            for behaviour in BEHAVIOURS:
                for version in range(1, VERSIONS + 1):
                    publish(made_up(f"org/model-{number}", behaviour, version, rng), folder)
        registry = Registry((folder,))
        ranking = registry.find(["org/model-0"], "safety").ranking
        return {
            "rankings": models * len(BEHAVIOURS) * VERSIONS,
            "find": milliseconds(lambda: registry.find(["Org/Model-7"], "faithful"), REPEATS),
            "find_and_rank": milliseconds(lambda: ranked(registry), REPEATS),
            "rank_only": milliseconds(ranking.experts, REPEATS),
            "not_found": milliseconds(lambda: unknown(registry), 20),
            "list_everything": milliseconds(lambda: list(registry.entries()), 10),
        }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000), indent=1) + "\n")
