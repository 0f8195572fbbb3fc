"""The cost benchmark's own parts: ratios, work, and the growth of what steering adds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cost.__main__ import seconds_for
from benchmarks.cost.growth import measure_growth
from benchmarks.cost.ratios import ratio
from benchmarks.cost.work import Work, decode, prefill, profiles, questions
from vllm_steermoe_plugin.steering.profile import SteeringProfile


def test_a_ratio_is_of_throughput_and_by_rounds() -> None:
    found = ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])
    assert (found.median, found.low, found.high, found.least, found.most) == (0.5,) * 5
    spread = ratio([1.0, 1.0, 1.0, 1.0], [0.5, 1.0, 1.0, 2.0])
    assert spread.median == 1.0 and spread.least == 0.5 <= spread.low <= 1.0 <= spread.high <= spread.most == 2.0
    with pytest.raises(ValueError, match="pair up, got 1 and 2"):
        ratio([1.0], [1.0, 2.0])


def test_work_has_the_size_that_is_asked_for() -> None:
    rng = random.Random(0)
    assert prefill(rng, 400, requests=3, length=7).tokens == 3 * 8
    assert decode(rng, 400, requests=2, generated=5).tokens == 2 * (8 + 5)
    asked = questions(rng, 400, documents=2, each=3, length=10, question=4, generated=1)
    assert len(asked.prompts) == 6 and len({tuple(prompt[:10]) for prompt in asked.prompts}) == 2
    assert all(16 <= token < 400 for prompt in asked.prompts for token in prompt)


def test_profiles_differ_and_touch_every_layer() -> None:
    made = profiles(random.Random(0), 5, layers=3, experts=8, top_k=4)
    assert len(set(made)) == 5
    for text in made:
        profile = SteeringProfile.from_json(text)
        assert {layer for layer, _ in profile.activate} == {layer for layer, _ in profile.deactivate} == {0, 1, 2}


@pytest.mark.nightly
def test_growth_is_measured_and_drawn(tmp_path: Path) -> None:
    found = measure_growth(tmp_path / "growth.png", quick=True)
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert all(value > 0 for curves in found.values() for points in curves.values() for value in points.values())


class Recorder:
    """Stands in for an engine; remembers what it was asked."""

    def generate(self, prompts: object, arguments: object, new_tokens: int, *, text: bool) -> dict[str, Any]:
        self.asked = (prompts, arguments, new_tokens, text)
        return {"seconds": 1.5}


def test_requests_take_the_steerings_in_turn() -> None:
    engine: Any = Recorder()
    work = Work([[16], [17], [18]], 4)
    assert seconds_for(engine, work, ["a", "b"]) == 1.5
    assert engine.asked == (work.prompts, [{"steermoe": "a"}, {"steermoe": "b"}, {"steermoe": "a"}], 4, False)
    seconds_for(engine, work)
    assert engine.asked[1] == [None] * 3
