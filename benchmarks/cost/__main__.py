"""What steering costs: stock vLLM against the plugin idle and steering, interleaved, prefill and decode.

    python -m benchmarks.cost [--rounds N] [--out FOLDER] [--compile] [--quick]

Writes results.json and growth.png to the folder and prints the table of benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.cost.growth import measure_growth
from benchmarks.cost.ratios import Ratio, ratio
from benchmarks.cost.work import Work, decode, prefill, profiles, questions
from benchmarks.engine_process import EngineProcess
from benchmarks.random_olmoe import write_olmoe
from vllm_steermoe_plugin.compat.versions import tool_versions
from vllm_steermoe_plugin.steering.wire import STEER_KEY

ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Threads of the engines that wait must not take a core from the one that works.
    "OMP_WAIT_POLICY": "PASSIVE",
}
FULL = {"hidden": 1024, "intermediate": 512, "layers": 8}
QUICK = {"hidden": 128, "intermediate": 64, "layers": 2}
EXPERTS, TOP_K, VOCABULARY = 64, 8, 400
REQUESTS = 32
SCENARIOS = ("stock", "stock again", "idle", "one profile", "a profile each")
GOALS = {"idle": 0.995, "one profile": 0.99, "a profile each": 0.99}
RELEASED_GOAL = 10.0


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("out/cost"))
    parser.add_argument("--compile", action="store_true", help="vLLM's compiled graphs instead of eager mode")
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds, to see that it runs")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if os.isatty(1) else 120)
    size = QUICK if asked.quick else FULL
    rounds = 2 if asked.quick else asked.rounds
    with tempfile.TemporaryDirectory() as name:
        model = write_olmoe(Path(name) / "model", experts=EXPERTS, top_k=TOP_K, **size)
        log = asked.out / "engine.log"
        batched = _engines(model, asked.threads, log, eager=not asked.compile)
        seconds = _scenarios(batched, rounds, size["layers"], quick=asked.quick)
        released = _against_released(batched["plugin"], model, asked.threads, log, size["layers"], quick=asked.quick)
        for engine in batched.values():
            engine.close()
    growth = measure_growth(asked.out / "growth.png", quick=asked.quick)
    ratios = {
        work: {name: ratio(times["stock"], times[name]) for name in SCENARIOS[1:]} for work, times in seconds.items()
    }
    _show(console, ratios, released)
    results = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": asked.threads},
        "versions": tool_versions(),
        "model": {"architecture": "OlmoeForCausalLM", "experts": EXPERTS, "top_k": TOP_K, **size},
        "compiled": asked.compile,
        "rounds": rounds,
        "seconds": seconds,
        "ratios": {work: {name: asdict(r) for name, r in row.items()} for work, row in ratios.items()},
        "released": released,
        "growth": growth,
    }
    (asked.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def _options(*, eager: bool, **more: Any) -> dict[str, Any]:
    return {
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "max_num_seqs": 2 * REQUESTS,
        "max_num_batched_tokens": 4096,
        "enforce_eager": eager,
        "kv_cache_memory_bytes": 1 << 30,
        "gpu_memory_utilization": 0.2,
        **more,
    }


def _engines(model: Path, threads: int, log: Path, *, eager: bool) -> dict[str, EngineProcess]:
    kinds: dict[str, dict[str, Any] | None] = {"stock": None, "plugin": {}}
    return {
        name: _engine(model, settings, threads, log, _options(eager=eager))
        for name, settings in track(list(kinds.items()), "start engines")
    }


def _engine(
    model: Path, settings: dict[str, Any] | None, threads: int, log: Path, options: dict[str, Any]
) -> EngineProcess:
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    return EngineProcess(str(model), settings, options, environment=environment, log=log)


def seconds_for(engine: EngineProcess, work: Work, steerings: Sequence[str] = ()) -> float:
    """Seconds that `engine` takes; request i is steered by `steerings[i % len(steerings)]`, if there are any."""
    arguments = [
        {STEER_KEY: steerings[index % len(steerings)]} if steerings else None for index in range(len(work.prompts))
    ]
    return float(engine.generate(work.prompts, arguments, work.generated, text=False)["seconds"])


def _scenarios(
    engines: dict[str, EngineProcess], rounds: int, layers: int, *, quick: bool
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each kind of work in each scenario, round by round."""
    rng = random.Random(0)
    sets = profiles(rng, REQUESTS, layers=layers, experts=EXPERTS, top_k=TOP_K)
    steerings: dict[str, list[str]] = {"one profile": sets[:1], "a profile each": sets}
    seconds: dict[str, dict[str, list[float]]] = {
        work: {name: [] for name in SCENARIOS} for work in ("prefill", "decode")
    }
    for turn in track(range(-1, rounds), "stock vLLM and the plugin in turn"):
        for work, times in seconds.items():
            # Each scenario computes other prompts of the same size, so that none finds another's blocks.
            order = [*SCENARIOS[turn % 5 :], *SCENARIOS[: turn % 5]]
            for name in order:
                engine = engines["stock" if name.startswith("stock") else "plugin"]
                taken = seconds_for(engine, _work(work, rng, quick=quick), steerings.get(name, []))
                # The first turn warms up.
                if turn >= 0:
                    times[name].append(taken)
    return seconds


def _work(kind: str, rng: random.Random, *, quick: bool) -> Work:
    """New prompts each time, so that nothing is found in a prefix cache."""
    if kind == "prefill":
        return prefill(rng, VOCABULARY, requests=8, length=32 if quick else 256)
    return decode(rng, VOCABULARY, requests=REQUESTS, generated=4 if quick else 32)


def _against_released(
    batched: EngineProcess, model: Path, threads: int, log: Path, layers: int, *, quick: bool
) -> dict[str, Any]:
    """The same steered work in normal batches, and with the released method's settings: one request at a time,
    eager, no prefix cache."""
    options = _options(eager=True, enable_prefix_caching=False) | {"max_num_seqs": 1}
    one_by_one = _engine(model, {}, threads, log, options)
    rng = random.Random(1)
    steering = profiles(rng, 1, layers=layers, experts=EXPERTS, top_k=TOP_K)
    found: dict[str, Any] = {}
    shapes: dict[str, dict[str, int]] = {
        "32 questions on each of two documents": {
            "documents": 2,
            "each": 32,
            "length": 512,
            "question": 24,
            "generated": 8,
        },
        "64 questions without a document": {"documents": 1, "each": 64, "length": 8, "question": 24, "generated": 16},
    }
    for title, shape in track(shapes.items(), "the released method's settings"):
        ratios = []
        for _ in range(1 if quick else 2):
            work: Work = questions(rng, VOCABULARY, **shape)
            fast = seconds_for(batched, work, steering)
            ratios.append(seconds_for(one_by_one, work, steering) / fast)
        found[title] = {"times": ratios, "shape": shape}
    one_by_one.close()
    return found


def _show(console: Console, ratios: dict[str, dict[str, Ratio]], released: dict[str, Any]) -> None:
    table = Table(title="throughput over stock vLLM: median of rounds (95 % interval)")
    for column in ("", *ratios, "goal"):
        table.add_column(column)
    for name in SCENARIOS[1:]:
        table.add_row(name, *(str(row[name]) for row in ratios.values()), str(GOALS.get(name, "noise")))
    console.print(table)
    for title, row in released.items():
        times = sorted(row["times"])
        console.print(
            f"{title}: {times[len(times) // 2]:.1f} times the released method's settings "
            f"[{times[0]:.1f} to {times[-1]:.1f}], goal {RELEASED_GOAL:g}"
        )


if __name__ == "__main__":
    main()
