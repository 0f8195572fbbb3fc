"""The GPU path inside vLLM: equal to stock vLLM when off, steerable without a new capture, and how fast.

    python -m benchmarks.gpu.serve MODEL [--requests N] [--new-tokens N] [--rounds N] [--option KEY=JSON ...]

On any machine with a GPU, vLLM and this package. Two engines run beside each other, stock vLLM (without the plugin)
and vLLM with it, in processes of their own, and take turns; then a third counts what the routers chose. Prints a
report in Markdown. Exit status: 0 all right and fast enough, 1 not so, 2 right, but run without a GPU: not measured.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine_process import Arguments, EngineProcess
from benchmarks.gpu.serve_report import ServeReport, Speed
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans
from vllm_steermoe_plugin.steering.profile import SteeringProfile
from vllm_steermoe_plugin.steering.wire import COUNT_KEY, STEER_KEY


def some_profiles(about: dict[str, Any], seed: int) -> tuple[SteeringProfile, SteeringProfile]:
    """One that activates K experts in every layer, one that deactivates half of the other E - K."""
    chance = random.Random(seed)
    experts, top_k = about["num_experts"], about["top_k"]
    activate, deactivate = set(), set()
    for layer in about["layers"]:
        activate |= {(layer, expert) for expert in chance.sample(range(experts), top_k)}
        deactivate |= {(layer, expert) for expert in chance.sample(range(experts), (experts - top_k + 1) // 2)}
    return SteeringProfile(activate=frozenset(activate)), SteeringProfile(deactivate=frozenset(deactivate))


def steer(profile: SteeringProfile) -> Arguments:
    """`extra_args` of a request with that profile."""
    return {STEER_KEY: profile.to_json()}


def only_steered_change(before: dict[str, Any], after: dict[str, Any], arguments: Sequence[Arguments]) -> bool:
    """Whether each steered request has other log-probabilities than before, and no other request other tokens."""
    steered = [each is not None for each in arguments]
    changed = [one != other for one, other in zip(before["logprobs"], after["logprobs"], strict=True)]
    kept = [one == other for one, other in zip(before["tokens"], after["tokens"], strict=True)]
    # Its neighbours' log-probabilities need not be the same bit for bit: their experts have other tokens beside them.
    return any(steered) and all(changed[i] if steered[i] else kept[i] for i in range(len(steered)))


def run(model: str, requests: int, new_tokens: int, rounds: int, options: dict[str, Any]) -> ServeReport:
    """Start the engines, compare, time, count."""
    stock, steered = EngineProcess(model, None, options), EngineProcess(model, {}, options)
    about = steered.about
    chance = random.Random(0)
    prompts = [[chance.randrange(about["vocabulary"]) for _ in range(chance.randint(8, 64))] for _ in range(requests)]
    off: list[Arguments] = [None] * requests
    up, down = some_profiles(about, seed=1)
    mixed: list[Arguments] = [steer(up) if index % 3 == 1 else None for index in range(requests)]
    checks: dict[str, bool] = {}

    first = stock.generate(prompts, off, new_tokens, exact=True)
    again = stock.generate(prompts, off, new_tokens, exact=True)
    plain = steered.generate(prompts, off, new_tokens, exact=True)

    def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return bool(one["tokens"] == other["tokens"] and one["logprobs"] == other["logprobs"])

    checks["stock vLLM repeats itself bit for bit (else the next line says nothing)"] = same(first, again)
    checks["unsteered requests are those of stock vLLM bit for bit"] = same(first, plain)
    graphs = plain["graphs"]
    by_up = steered.generate(prompts, [steer(up)] * requests, new_tokens, exact=True)
    by_down = steered.generate(prompts, [steer(down)] * requests, new_tokens, exact=True)
    checks["other profiles give other outputs"] = len({str(x["logprobs"]) for x in (plain, by_up, by_down)}) == 3
    checks["a profile that comes back gives its output again"] = same(
        by_up, steered.generate(prompts, [steer(up)] * requests, new_tokens, exact=True)
    )
    in_mix = steered.generate(prompts, mixed, new_tokens, exact=True)
    checks["in a mixed batch each steered request changes, and no other one its tokens"] = only_steered_change(
        plain, in_mix, mixed
    )
    later = SteeringProfile(activate=up.activate, phase="generation")
    by_later = steered.generate(prompts, [steer(later)] * requests, new_tokens, exact=True)
    checks["a profile for generated tokens leaves the first token as it is, and changes later ones"] = [
        each[0] for each in by_later["logprobs"]
    ] == [each[0] for each in plain["logprobs"]] and by_later["logprobs"] != plain["logprobs"]
    last = steered.generate(prompts, off, new_tokens, exact=True)
    checks["and afterwards unsteered requests are as before"] = same(plain, last)
    checks["nothing was captured anew"] = last["graphs"] == graphs
    # Workers in processes of their own count their graphs themselves, and eager execution captures none.
    if about["gpu"] is not None and about["workers"] == 1 and not options.get("enforce_eager"):
        checks["there are captured graphs"] = graphs > 0
    told = 4 * requests + sum(each is not None for each in mixed)
    checks["every worker has seen every steered request"] = set(steered.read()["steered_requests"]) == {told}

    speeds = []
    for number in range(rounds):
        turns = [("stock", stock, off), ("idle", steered, off), ("steered", steered, [steer(up)] * requests)]
        turns = turns[number % 3 :] + turns[: number % 3]
        speed = {
            name: requests * new_tokens / engine.generate(prompts, each, new_tokens)["seconds"]
            for name, engine, each in turns
        }
        speeds.append(Speed(**speed))
    stock.close()
    steered.close()
    checks["routers choose exactly the activated experts for every prompt token"] = _counted(
        model, prompts, up, options
    )
    setting = {"model": Path(model).name, "requests": requests, "new tokens": new_tokens, **about}
    del setting["layers"], setting["gpu"]
    return ServeReport(about["gpu"], setting | {"graphs captured": graphs}, checks, speeds)


def _counted(model: str, prompts: list[list[int]], profile: SteeringProfile, options: dict[str, Any]) -> bool:
    counting = EngineProcess(model, {"count_groups": 1}, options)
    arguments: list[Arguments] = [
        {STEER_KEY: profile.to_json(), COUNT_KEY: CountedSpans(1, ((0, len(prompt)),)).to_json()} for prompt in prompts
    ]
    counting.generate(prompts, arguments, 1)
    found = counting.read()
    layers = counting.about["layers"]
    wanted = [
        [found["tokens"] * ((layer, expert) in profile.activate) for expert in range(counting.about["num_experts"])]
        for layer in layers
    ]
    counting.close()
    return bool(found["selections"] == wanted and found["tokens"] == sum(map(len, prompts)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the report; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.serve", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="a hub id that is in the cache, a folder, or steermoe-lab")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--option", action="append", default=[], metavar="KEY=JSON", help="argument of vllm.LLM")
    parser.add_argument("--out", type=Path, help="also write the report there")
    chosen = parser.parse_args(arguments)
    # Two engines share the GPU. A prompt from the prefix cache is computed in other pieces than a new one.
    options = {"gpu_memory_utilization": 0.45, "max_model_len": 1024, "enable_prefix_caching": False}
    options |= {key: json.loads(value) for key, value in (text.split("=", 1) for text in chosen.option)}
    report = run(chosen.model, chosen.requests, chosen.new_tokens, chosen.rounds, options)
    text = report.to_markdown()
    print(text)  # noqa: T201
    if chosen.out is not None:
        chosen.out.write_text(text, encoding="utf-8")
    return report.exit_status


if __name__ == "__main__":
    sys.exit(main())
