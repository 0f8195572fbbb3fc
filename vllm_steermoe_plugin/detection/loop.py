"""The loop of a detection: chunk by chunk, the engine counts while what comes before and after is done beside it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from expert_registry import rank_experts
from expert_registry.counts import Counts
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.detection.engine_client import count_groups
from vllm_steermoe_plugin.detection.pair_counting import SIDES, Encoded, encode_pairs, sent_pairs, take_pairs
from vllm_steermoe_plugin.detection.pairs import PairsError, PairSet
from vllm_steermoe_plugin.detection.progress_file import Checkpoint, Progress
from vllm_steermoe_plugin.progress_bar import track

if TYPE_CHECKING:
    from vllm import LLM

STABLE_CHUNKS = 5
"""Early stop: over how many chunks the top of the ranking must not have changed."""


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


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Encoded pairs, after which `done` pairs were looked at; why others are left out; merged tokens."""

    done: int
    encoded: list[Encoded]
    skipped: list[str]
    merged: int


@dataclass(frozen=True, slots=True)
class _Counted:
    """A chunk with its selections `[n, 2, L, E]` and tokens `[n, 2]`."""

    chunk: _Chunk
    selections: Counts
    tokens: Counts


class DetectionLoop:
    """Counts in an engine what `progress` has not counted yet."""

    def __init__(
        self,
        engine: LLM,
        shape: MoEShape,
        pairs: PairSet,
        options: DetectionOptions,
        progress: Progress,
        checkpoint: Checkpoint | None,
    ) -> None:
        self._engine = engine
        self._shape = shape
        self._pairs = pairs
        self._clusters = pairs.clusters()
        self._options = options
        self._progress = progress
        self._checkpoint = checkpoint
        self._pairs_at_once = count_groups(engine) // SIDES

    def run(self, title: str) -> bool:
        """Count all pairs, or until the top is stable; whether it was.

        Raises:
            PairsError: a pair cannot be counted. What was counted before it is kept in the checkpoint.
        """
        progress, total = self._progress, len(self._pairs.pairs)
        coming = self._encode(progress.done)
        counted: _Counted | None = None
        # The sums are numpy's work, which leaves the engine alone even where it runs in this process. Encoding is
        # Python's: two threads of that would wait for each other at every operation.
        with ThreadPoolExecutor(1, "steermoe-sums") as beside:
            chunks = range(progress.done, total, self._pairs_at_once)
            for _ in track(chunks, title, done=-(-progress.done // self._pairs_at_once)):
                if isinstance(coming, PairsError):
                    self._keep(counted)
                    raise coming
                chunk = coming
                for text in chunk.skipped:
                    self._options.report(f"skipped: {text}")
                with sent_pairs(self._engine, chunk.encoded):
                    # If the engine is another process, it has begun, and what follows is done beside its work.
                    adding = beside.submit(self._add, counted)
                    if chunk.done < total:
                        coming = self._encode(chunk.done)
                    taken = take_pairs(self._engine, self._shape, chunk.encoded)
                adding.result()
                counted = _Counted(chunk, *taken)
                if self._options.stop_when_stable is not None:
                    self._add(counted)
                    counted = None
                    if self._stable() and progress.done < total:
                        self._options.report(f"the top of the ranking is stable after {progress.done} pairs")
                        return True
        self._add(counted)
        return False

    def _encode(self, start: int) -> _Chunk | PairsError:
        part = self._pairs.pairs[start : start + self._pairs_at_once]
        balance, skip_bad = self._options.balance, self._options.skip_bad
        try:
            found = encode_pairs(self._engine, part, start, balance=balance, skip_bad=skip_bad)
        except PairsError as error:
            return error
        return _Chunk(start + len(part), *found)

    def _add(self, counted: _Counted | None) -> None:
        if counted is None:
            return
        progress, chunk = self._progress, counted.chunk
        numbers = [self._clusters[place] for place, _, _ in chunk.encoded]
        progress.add(chunk.done, numbers, counted.selections, counted.tokens, chunk.skipped, chunk.merged)
        # A chunk without a pair that counts says nothing about the top.
        if self._options.stop_when_stable is not None and numbers:
            progress.tops = [*progress.tops[-STABLE_CHUNKS:], self._top(self._options.stop_when_stable)]
        if self._checkpoint is not None:
            progress.save(self._checkpoint)

    def _keep(self, counted: _Counted | None) -> None:
        """Before the end by a bad pair: hours may have been counted until then, and whoever leaves it out goes on."""
        self._add(counted)
        if self._checkpoint is None or not self._progress.done:
            return
        self._progress.save(self._checkpoint, now=True)
        self._options.report(f"{self._progress.done} pairs before it are counted and kept in {self._checkpoint.path}")

    def _top(self, number: int) -> frozenset[tuple[int, int]]:
        ranked = rank_experts(self._progress.sums.counts(self._shape.layers))[:number]
        return frozenset((expert.layer, expert.expert) for expert in ranked)

    def _stable(self) -> bool:
        tops = self._progress.tops
        return len(tops) > STABLE_CHUNKS and len(set(tops)) == 1
