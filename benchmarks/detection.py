"""How fast detection is: against plain prefill of the same texts, and against the released procedure.

    python -m benchmarks.detection [--model lab|olmoe|deep] [--texts chats|documents] [--pairs N] [--rounds N]
        [--released N]

Rounds are interleaved, so that a busy machine slows all of them alike; ratios are taken round by round.
"""

from __future__ import annotations

import os

os.environ.update(
    {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
    }
)

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams

from benchmarks import detection_texts
from benchmarks.random_olmoe import write_olmoe
from benchmarks.released_procedure import count_one_at_a_time, prefill_one
from expert_registry import Ranking, Recommended
from vllm_steermoe_plugin.detection.detect import detect
from vllm_steermoe_plugin.detection.engine_client import COUNT_GROUPS
from vllm_steermoe_plugin.detection.pairs import PairSet
from vllm_steermoe_plugin.detection.recipes.recipe import Behaviour
from vllm_steermoe_plugin.detection.token_spans import TokenSpan, encode_side
from vllm_steermoe_plugin.engine import start_engine
from vllm_steermoe_plugin.models import lab_checkpoint

BEHAVIOUR = Behaviour("speed", ("one", "two"), False, Recommended(activate=1, deactivate=1))
OPTIONS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 512,
    "max_num_batched_tokens": 4096,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "kv_cache_memory_bytes": 256 << 20,
    "gpu_memory_utilization": 0.2,
}


SIZES = {
    "olmoe": {"hidden": 256, "intermediate": 128, "layers": 4, "experts": 64, "top_k": 8},
    # As many layers and experts as Qwen3-30B-A3B, and so thin that the forward pass is the smallest part.
    "deep": {"hidden": 64, "intermediate": 32, "layers": 48, "experts": 128, "top_k": 8},
}


def plain(engine: LLM, texts: list[str]) -> None:
    """Prefill texts as anybody would; one token must be generated."""
    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    engine.generate(texts, params, use_tqdm=False)


def seconds(work: Callable[[], Any], *engines: LLM) -> float:
    """How long it takes; the prefix caches of the engines are emptied before."""
    for engine in engines:
        engine.reset_prefix_cache()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def shown(name: str, values: list[float]) -> str:
    return f"{name:<58} {statistics.median(values):8.2f}   [{min(values):.2f}, {max(values):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("lab", *SIZES), default="olmoe")
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--texts", choices=("chats", "documents"), default="chats")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--released", type=int, default=16, help="pairs for the released procedure, which is slow")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = (
            lab_checkpoint.NAME if asked.model == "lab" else str(write_olmoe(folder / "model", **SIZES[asked.model]))
        )
        if asked.texts == "chats":
            pairs = detection_texts.chats(asked.pairs, joined=3)
            options = OPTIONS
        else:
            pairs = detection_texts.documents(asked.pairs, questions=5, words=130)
            options = {**OPTIONS, "enable_prefix_caching": True, "block_size": 32}
        counting = start_engine(model, {"count_groups": COUNT_GROUPS}, **options)
        without = start_engine(model, {"enabled": False}, **options)
        against_prefill(counting, without, pairs, asked.rounds)
        one_by_one = start_engine(model, {"enabled": False}, **{**OPTIONS, "max_num_seqs": 1})
        against_released(counting, one_by_one, pairs, asked.released, folder)


def against_prefill(counting: LLM, without: LLM, pairs: PairSet, rounds: int) -> None:
    tokenizer = counting.get_tokenizer()
    texts = [
        tokenizer.apply_chat_template([m.model_dump() for m in side.messages or ()], tokenize=False)
        for pair in pairs.pairs
        for side in (pair.side_1, pair.side_2)
    ]
    total = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    work: dict[str, Callable[[], Any]] = {
        "without": lambda: plain(without, texts),
        "plain": lambda: plain(counting, texts),
        "detect": lambda: detect(counting, "speed", pairs, BEHAVIOUR),
    }
    for one in work.values():
        seconds(one, counting, without)
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds):
        names = list(work)
        for name in names[turn % 3 :] + names[: turn % 3]:
            times[name].append(seconds(work[name], counting, without))
    print(f"{len(texts)} texts, {total} tokens, {rounds} rounds; median [least, most]")  # noqa: T201
    rows = [
        shown(f"{label}, tokens per second", [total / t for t in times[name]])
        for name, label in (
            ("without", "plain prefill, plugin off"),
            ("plain", "plain prefill, same engine"),
            ("detect", "detection"),
        )
    ]
    for name, label in (("plain", "same engine"), ("without", "plugin off")):
        ratios = [a / b for a, b in zip(times[name], times["detect"], strict=True)]
        rows.append(shown(f"detection / plain prefill, {label}", ratios))
    print("\n".join(rows))  # noqa: T201


def against_released(counting: LLM, one_by_one: LLM, pairs: PairSet, number: int, folder: Path) -> None:
    """The same texts both ways; the larger set is timed for detection too, and compared per token."""
    some = PairSet(pairs.name, pairs.sha256, pairs.pairs[:number])
    tokenizer = counting.get_tokenizer()
    found: list[Ranking] = []
    fast = []
    for _ in range(3):
        fast.append(seconds(lambda: found.append(detect(counting, "speed", some, BEHAVIOUR)), counting))
    counted: list[Any] = []

    def encoded() -> tuple[list[TokenSpan], list[TokenSpan]]:
        one, two = (
            [encode_side(getattr(pair, side), tokenizer, pair.origin) for pair in some.pairs]
            for side in ("side_1", "side_2")
        )
        return one, two

    top_k = found[0].shape.top_k
    slow = seconds(lambda: counted.append(count_one_at_a_time(one_by_one, encoded(), top_k, folder)))

    def prefill_all() -> None:
        for texts in encoded():
            for text in texts:
                prefill_one(one_by_one, list(text.token_ids))

    bare = seconds(prefill_all)
    whole = min(seconds(lambda: detect(counting, "speed", pairs, BEHAVIOUR), counting) for _ in range(2))
    selections, tokens = counted[0]
    assert tokens == found[0].counts.tokens.tolist(), "both ways must count the same tokens"
    mine = np.stack([found[0].counts.activations_1, found[0].counts.activations_2])
    # In bfloat16 a text alone and a text in a batch may route a few tokens differently.
    differing = np.abs(selections - mine).sum() / (2 * mine.sum())
    each = whole / len(pairs.pairs) / (slow / number)
    print(f"released procedure, {number} pairs: {slow:.2f} s; selections that differ: {differing:.2%}")  # noqa: T201
    print(  # noqa: T201
        f"of which {bare:.2f} s are its forward passes alone, one text at a time: whatever it wrote and counted, "
        f"detection could not be more than {bare / statistics.median(fast):.1f} times as fast without them"
    )
    print(f"detection of the same pairs: {statistics.median(fast):.3f} s, {slow / statistics.median(fast):.1f} times")  # noqa: T201
    print(f"detection of all {len(pairs.pairs)} pairs: {whole:.2f} s, per pair {1 / each:.1f} times")  # noqa: T201


if __name__ == "__main__":
    main()
