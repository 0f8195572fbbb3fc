"""Detections that are interrupted, go on under other conditions, or stop early among bad pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expert_registry.errors import UsageError
from tests.support.few_pairs import BEHAVIOUR, few, same
from tests.support.planted import planted_ranking
from vllm_steermoe_plugin.detection import loop as detection_loop
from vllm_steermoe_plugin.detection import pair_counting
from vllm_steermoe_plugin.detection.attribution import attribute
from vllm_steermoe_plugin.detection.detect import detect
from vllm_steermoe_plugin.detection.loop import DetectionOptions
from vllm_steermoe_plugin.detection.pairs import PairSet
from vllm_steermoe_plugin.detection.progress_file import ResumeError
from vllm_steermoe_plugin.models import lab_checkpoint

PLAIN = DetectionOptions(permutations=9)


@pytest.fixture
def engine(lab: Any) -> Any:
    """Eight groups, so that a chunk is four pairs."""
    return lab


def interrupt_waiting(engine: Any, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Of the next wait, only so many steps are done."""

    def wait(**options: Any) -> None:
        for _ in range(after):
            engine.llm_engine.step()
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "wait_for_completion", wait)


@pytest.mark.parametrize("steps", [0, 1])
def test_what_an_interruption_leaves_is_not_counted_by_the_next(
    engine: Any, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    pairs = few("digits", 10)
    whole = detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=PLAIN)
    with monkeypatch.context() as some:
        interrupt_waiting(engine, some, steps)
        with pytest.raises(KeyboardInterrupt):
            detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=PLAIN)
        with pytest.raises(KeyboardInterrupt):
            attribute(engine, planted_ranking("digits"), "Count from 2 to 4.")
    assert not engine.llm_engine.has_unfinished_requests()
    same(whole, detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=PLAIN))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("revision", "other"),
        ("tokenizer_revision", "other"),
        ("quantization", "fp8"),
        ("max_model_len", 77),
    ],
)
def test_progress_under_other_conditions_is_not_taken_up(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    options = replace(PLAIN, checkpoint=tmp_path / "progress", checkpoint_every=0.0)
    pairs = few("digits", 5)
    detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=options)
    with monkeypatch.context() as some:
        some.setattr(engine.llm_engine.vllm_config.model_config, name, value)
        with pytest.raises(ResumeError, match="another model, other pairs or other options"):
            detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=options)
    with monkeypatch.context() as some:
        some.setattr(engine.llm_engine.vllm_config.model_config.hf_config, "rms_norm_eps", 0.5)
        with pytest.raises(ResumeError, match="another model"):
            detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=options)
    detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=options)


def with_bad(pairs: PairSet, bad: range) -> PairSet:
    some = list(pairs.pairs)
    for number in bad:
        some[number] = replace(some[number], side_2=replace(some[number].side_2, target="not there"))
    return replace(pairs, pairs=tuple(some))


def test_chunks_in_which_nothing_counts_do_not_make_the_top_stable(engine: Any) -> None:
    """Twenty-eight bad pairs are seven chunks: more than the top has to stay the same for."""
    options = replace(PLAIN, skip_bad=True, stop_when_stable=1)
    pairs = few("digits", 60)
    late = detect(engine, lab_checkpoint.NAME, with_bad(pairs, range(28)), BEHAVIOUR, options=options)
    seen = with_bad(pairs, range(28)).first(late.card.data.pairs + 28)
    same(late, detect(engine, lab_checkpoint.NAME, seen, BEHAVIOUR, options=replace(options, stop_when_stable=None)))
    between = detect(engine, lab_checkpoint.NAME, with_bad(pairs, range(4, 32)), BEHAVIOUR, options=options)
    assert between.card.data.pairs > 4


@pytest.mark.parametrize("number", [96, 100_000])
def test_a_top_of_all_experts_is_always_stable_and_refused(engine: Any, number: int) -> None:
    options = replace(PLAIN, stop_when_stable=number)
    with pytest.raises(UsageError, match="the first 1 to 95 of 96 experts"):
        detect(engine, lab_checkpoint.NAME, few("digits", 5), BEHAVIOUR, options=options)


def test_a_resumed_detection_shows_how_far_it_is(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(PLAIN, checkpoint=tmp_path / "progress", checkpoint_every=0.0)
    pairs = few("digits", 22)
    shown: list[tuple[int, int]] = []
    original = detection_loop.track

    def track(chunks: Any, title: str, done: int = 0) -> Any:
        shown.append((done, done + len(chunks)))
        return original(chunks, title, done)

    monkeypatch.setattr(detection_loop, "track", track)
    with monkeypatch.context() as some:
        take, calls = pair_counting.take_counts, iter(range(9))
        some.setattr(pair_counting, "take_counts", lambda *given: take(*given) if next(calls) < 3 else interrupt())
        with pytest.raises(KeyboardInterrupt):
            detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=options)
    detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=options)
    # Twenty-two pairs are six chunks of four; the third was added up beside the fourth, which was interrupted.
    assert shown == [(0, 6), (3, 6)]


def interrupt() -> None:
    raise KeyboardInterrupt
