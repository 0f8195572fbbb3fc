"""The progress of a detection, kept in a file so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from expert_registry import ExampleSums
from expert_registry.counts import Counts
from expert_registry.errors import RankingFormatError, SteerMoEError
from expert_registry.files import write_atomic

_KEY = "steermoe_progress"
_MAX_BYTES = 4 << 30


class ResumeError(SteerMoEError):
    """A file of progress cannot be used."""

    code = "STEERMOE-E403"


def digest_of(*parts: object) -> str:
    """Of everything that the sums depend on: progress is taken up only by the very same detection."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a detection's progress is kept.

    Attributes:
        path: of the file.
        digest: of the detection, see `digest_of`.
        every: seconds between two writings.
    """

    path: Path
    digest: str
    every: float


@dataclass(slots=True)
class Progress:
    """What was counted so far.

    Attributes:
        sums: of the pairs that were counted.
        skipped: of each pair that was left out, why.
        done: pairs that were looked at.
        merged: tokens that reach over the edge of what is counted.
        tops: `(layer, expert)` of the first experts after each of the last chunks, where it is to stop when
            they are stable.
    """

    sums: ExampleSums
    skipped: list[str]
    done: int = 0
    merged: int = 0
    tops: list[frozenset[tuple[int, int]]] = field(default_factory=list)
    _saved: float = field(default_factory=time.monotonic)

    def add(
        self,
        done: int,
        numbers: Sequence[int],
        selections: Counts,
        tokens: Counts,
        skipped: Sequence[str],
        merged: int,
    ) -> None:
        """Add a chunk, after which `done` pairs were looked at; arrays as for `ExampleSums.add`."""
        if len(numbers):
            self.sums.add(numbers, selections, tokens)
        self.skipped.extend(skipped)
        self.merged += merged
        self.done = done

    def save(self, checkpoint: Checkpoint, *, now: bool = False) -> None:
        """Write all of it at once, unless that was done too short a time ago and is not wanted `now`.

        Sums and number of pairs are in one file that replaces the one before, so a kill at any moment
        leaves both of the same moment and nothing is counted twice.

        Raises:
            FileError: it cannot be written.
        """
        if not now and time.monotonic() - self._saved < checkpoint.every:
            return
        state = {
            "digest": checkpoint.digest,
            "done": self.done,
            "merged": self.merged,
            "skipped": self.skipped,
            "tops": [sorted(top) for top in self.tops],
        }
        data = save(self.sums.tensors(), metadata={_KEY: json.dumps(state)})
        write_atomic(checkpoint.path, data, overwrite=True)
        self._saved = time.monotonic()

    def resume(self, checkpoint: Checkpoint) -> bool:
        """Take up what the file holds; False if there is none.

        Raises:
            ResumeError: it is damaged, or of another detection.
        """
        path = checkpoint.path
        if not path.exists():
            return False
        advice = "remove it to start anew"
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ResumeError(f"{path} is too large for a file of progress; {advice}")
            with safe_open(path, framework="numpy") as file:
                state = json.loads((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            found, done, merged, skipped = (state[key] for key in ("digest", "done", "merged", "skipped"))
            tops = [frozenset((int(layer), int(expert)) for layer, expert in top) for top in state["tops"]]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, ResumeError):
                raise
            raise ResumeError(f"{path} is not a file of progress ({error}); {advice}") from None
        if found != checkpoint.digest:
            raise ResumeError(
                f"{path} belongs to a detection with another model, other pairs or other options; {advice}"
            )
        try:
            self.sums.restore(tensors)
        except RankingFormatError as error:
            raise ResumeError(f"{path}: {error}; {advice}") from None
        self.done, self.merged, self.skipped = int(done), int(merged), list(skipped)
        self.tops = tops
        return True
