"""Detection: run both sides of the pairs through the engine, count the selected experts, make a ranking."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_registry import DataRef, ExampleSums, ModelRef, Ranking, Recommended, rank_experts
from expert_registry.errors import EngineError
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.architectures import shape_of
from vllm_steermoe_plugin.checkpoints import revision_of
from vllm_steermoe_plugin.detection_card import check_described, detection_card
from vllm_steermoe_plugin.engine import count_groups
from vllm_steermoe_plugin.pair_counting import COUNT_GROUPS, SIDES, Encoded, encode_pairs, send_pairs, take_pairs
from vllm_steermoe_plugin.pairs import PairsError, PairSet
from vllm_steermoe_plugin.progress import track
from vllm_steermoe_plugin.resume import Checkpoint, Progress, ResumeError, digest_of
from vllm_steermoe_plugin.text_offsets import offset_tokenizer

if TYPE_CHECKING:
    from vllm import LLM

STABLE_CHUNKS = 5
"""Early stop: over how many chunks the top of the ranking must not have changed."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What is being detected, for the ranking's card."""

    name: str
    sides: tuple[str, str]
    safety: bool
    recommended: Recommended
    license: str = "unspecified"
    note: str = ""
    version: int = 1


@dataclass(frozen=True, slots=True)
class DetectionOptions:
    """How to count.

    Attributes:
        balance: count only as many tokens of the longer side of each pair as the shorter has.
        skip_bad: leave out pairs that cannot be encoded, and say so, instead of stopping.
        permutations: of the permutation test; 0 for none.
        seed: of the permutations and of the halves.
        stop_when_stable: stop when the first so many experts have been the same, in any order, for
            `STABLE_CHUNKS` chunks; None to count all pairs.
        checkpoint: file to go on from after a kill, the caller's to remove once the ranking is safe; None for none.
        checkpoint_every: seconds between two writings of it.
        report: told in words what was skipped, resumed or stopped.
    """

    balance: bool = False
    skip_bad: bool = False
    permutations: int = 999
    seed: int = 0
    stop_when_stable: int | None = None
    checkpoint: Path | None = None
    checkpoint_every: float = 30.0
    report: Callable[[str], None] = field(default=lambda text: None)


def detect(
    engine: LLM,
    model_id: str,
    pairs: PairSet,
    behaviour: Behaviour,
    revision: str = "",
    options: DetectionOptions | None = None,
) -> Ranking:
    """Count the routing of both sides of `pairs` in a running engine and rank the experts.

    Each text is one prompt in vLLM's normal batches; the counted positions are counted on the
    device, from the experts that the router really selected. Memory does not grow with the pairs.

    Args:
        engine: started with the setting `count_groups`, best `COUNT_GROUPS` (see `start_engine`).
        model_id: name under which the ranking will be looked up.
        pairs: side 1 shows the behaviour.
        behaviour: goes into the card.
        revision: of the checkpoint.
        options: see there.

    Raises:
        RequestError: the model's name or the behaviour cannot stand in a card.
        PairsError: a pair cannot be counted.
        ResumeError: the checkpoint is damaged, or of another detection.
        EngineError: the model has no routed experts that can be counted, the engine does not count, or its
            tokenizer gives no character offsets.
    """
    options = options or DetectionOptions()
    check_described(model_id, behaviour, pairs)
    config = engine.llm_engine.vllm_config.model_config
    shape = shape_of(config.hf_config, config.architecture)
    groups = count_groups(engine)
    if groups < SIDES:
        raise EngineError(
            f"this engine counts {groups} groups; start it with the setting 'count_groups' at {COUNT_GROUPS}"
        )
    tokenizer = offset_tokenizer(engine)
    sums = ExampleSums(len(shape.layers), shape.num_experts, permutations=options.permutations, seed=options.seed)
    progress = Progress(sums, list(pairs.skipped))
    checkpoint = None
    if options.checkpoint is not None:
        digest = _digest(model_id, revision or revision_of(model_id), config, shape, pairs, options)
        checkpoint = Checkpoint(options.checkpoint, digest, options.checkpoint_every)
        if progress.resume(checkpoint):
            if len(progress.skipped) > len(pairs.skipped) and not options.skip_bad:
                raise ResumeError(
                    f"{checkpoint.path} left out bad pairs; ask for that again, or remove it to start anew"
                )
            options.report(f"going on from {checkpoint.path}: {progress.done} of {len(pairs.pairs)} pairs are counted")
    engine.collective_rpc("steermoe_reset_counts")
    stopped = _count_all(engine, shape, pairs, progress, checkpoint, groups // SIDES, options, behaviour.name)
    if not sums.examples:
        raise PairsError(f"{pairs.name}: no pair is left to count; the first bad one: {progress.skipped[0]}")
    counts = sums.counts(shape.layers)
    counts.check(shape)
    card = detection_card(
        # transformers keeps the commit of what it loads from the hub.
        ModelRef(
            id=model_id,
            revision=revision or str(getattr(config.hf_config, "_commit_hash", None) or ""),
            architecture=shape.architecture,
        ),
        shape,
        behaviour,
        DataRef(name=pairs.name, sha256=pairs.sha256, pairs=sums.examples),
        pairs.rule + ("; as many tokens of the longer side as the shorter has" if options.balance else ""),
        _notes(str(config.dtype).rpartition(".")[2], bool(tokenizer.chat_template), progress, pairs, options, stopped),
    )
    return Ranking(counts, card, sums.summary())


def _notes(
    dtype: str, chat_template: bool, progress: Progress, pairs: PairSet, options: DetectionOptions, stopped: bool
) -> list[str]:
    """What else the counts, and what is drawn at random, depend on."""
    notes = [f"Counted in {dtype}; halves and permutations by seed {options.seed}."]
    if stopped:
        notes.append(
            f"Stopped after {progress.done} of {len(pairs.pairs)} pairs: the first {options.stop_when_stable} "
            f"experts had not changed for {STABLE_CHUNKS} chunks."
        )
    if progress.skipped:
        notes.append(f"{len(progress.skipped)} bad pairs were skipped.")
    if progress.merged:
        notes.append(f"{progress.merged} tokens reach over the edge of what is counted; they count.")
    if not chat_template:
        notes.append("The model has no chat template; chats were written as lines 'Role: content'.")
    return notes


def _digest(
    model_id: str, revision: str, config: Any, shape: MoEShape, pairs: PairSet, options: DetectionOptions
) -> str:
    # Not only the file's hash: how its lines are read depends on more than the file.
    read = [hashlib.sha256(repr(pair).encode()).digest() for pair in pairs.pairs]
    # Not `skip_bad`: what was counted before a bad pair is found is the same either way.
    asked = (options.balance, options.permutations, options.seed)
    return digest_of(model_id, revision, config.model, config.dtype, shape, read, *asked)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Encoded pairs, after which `done` pairs were looked at; why others are left out; merged tokens."""

    done: int
    encoded: list[Encoded]
    skipped: list[str]
    merged: int


def _count_all(
    engine: LLM,
    shape: MoEShape,
    pairs: PairSet,
    progress: Progress,
    checkpoint: Checkpoint | None,
    chunk: int,
    options: DetectionOptions,
    name: str,
) -> bool:
    """Count chunk by chunk what is not counted yet; whether it stopped early."""

    def encode(start: int) -> _Chunk | PairsError:
        part = pairs.pairs[start : start + chunk]
        try:
            found = encode_pairs(engine, part, start, balance=options.balance, skip_bad=options.skip_bad)
        except PairsError as error:
            return error
        return _Chunk(start + len(part), *found)

    def add(counted: tuple[_Chunk, Any, Any]) -> None:
        part, selections, tokens = counted
        numbers = [number for number, _, _ in part.encoded]
        progress.add(part.done, numbers, selections, tokens, part.skipped, part.merged)
        if options.stop_when_stable is not None:
            progress.tops = [*progress.tops[-STABLE_CHUNKS:], _top(progress, shape, options.stop_when_stable)]
        if checkpoint is not None:
            progress.save(checkpoint)

    coming = encode(progress.done)
    counted: tuple[_Chunk, Any, Any] | None = None
    # The sums are numpy's work, which leaves the engine alone even where it runs in this process. Encoding is Python's:
    # two threads of that would wait for each other at every operation.
    with ThreadPoolExecutor(1, "steermoe-sums") as beside:
        for _ in track(range(progress.done, len(pairs.pairs), chunk), f"count {name}"):
            if isinstance(coming, PairsError):
                # Hours may have been counted until then; whoever leaves the pair out goes on from here.
                if counted is not None and checkpoint is not None:
                    add(counted)
                    progress.save(replace(checkpoint, every=0.0))
                    options.report(f"{progress.done} pairs before it are counted and kept in {checkpoint.path}")
                raise coming
            part = coming
            for text in part.skipped:
                options.report(f"skipped: {text}")
            if part.encoded:
                send_pairs(engine, part.encoded)
            # If the engine is another process, it has begun, and what follows is done beside its work.
            adding = beside.submit(add, counted) if counted is not None else None
            if part.done < len(pairs.pairs):
                coming = encode(part.done)
            counted = (part, *(take_pairs(engine, shape, part.encoded) if part.encoded else (None, None)))
            if adding is not None:
                adding.result()
            if options.stop_when_stable is not None:
                add(counted)
                counted = None
                stable = len(progress.tops) > STABLE_CHUNKS and len(set(progress.tops)) == 1
                if stable and progress.done < len(pairs.pairs):
                    options.report(f"the top of the ranking is stable after {progress.done} pairs")
                    return True
    if counted is not None:
        add(counted)
    return False


def _top(progress: Progress, shape: MoEShape, number: int) -> frozenset[tuple[int, int]]:
    ranked = rank_experts(progress.sums.counts(shape.layers))[:number] if progress.sums.examples else []
    return frozenset((expert.layer, expert.expert) for expert in ranked)
