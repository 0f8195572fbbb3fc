"""The KL divergence from the most likely tokens, against SciPy's over all; and where prompts are from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr

from expert_registry.errors import SteerMoEError, UsageError
from lm_eval_tasks import divergence as module
from lm_eval_tasks.divergence import divergence, divergences, prompt_source
from lm_eval_tasks.evaluation import Options, controls_among, task_manager
from tests.support.canned_lm import CannedLM


def of_most_likely(logs: np.ndarray, most: int) -> dict[int, float]:
    return {int(token): float(logs[token]) for token in np.argsort(-logs)[:most]}


def test_the_whole_vocabulary_gives_the_divergence_and_fewer_tokens_a_lower_bound() -> None:
    generator = np.random.default_rng(0)
    for spread in (0.01, 1.0, 5.0):
        logs = generator.normal(size=200) * 3
        pair = [log_softmax(logs), log_softmax(logs + spread * generator.normal(size=200))]
        exact = float(rel_entr(*np.exp(pair)).sum())
        bounds = [divergence(*(of_most_likely(one, most) for one in pair)) for most in (1, 5, 20, 100, 200)]
        assert bounds[-1] == pytest.approx(exact, rel=1e-6, abs=1e-8)
        assert all(-1e-12 <= bound <= exact + 1e-9 for bound in bounds)
        assert bounds[2] > 0.3 * exact


def test_equal_distributions_diverge_by_nothing_and_others_by_a_finite_number() -> None:
    logs = of_most_likely(log_softmax(np.arange(9.0)), 4)
    assert divergence(logs, logs) == 0.0
    assert divergence({0: 0.0}, {1: 0.0}) == 0.0  # Of unlike tokens nothing is known but that they are some.
    assert 10 < divergence({0: 0.0, 1: -np.inf}, {0: -np.inf, 1: 0.0}) <= 100
    assert divergence({0: np.log(0.5), 1: np.log(0.5)}, {0: np.log(0.25), 1: np.log(0.75)}) == pytest.approx(0.143841)


def test_all_steerings_share_batches_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CannedLM(lambda *_: "")
    texts = [f"digits:strength={x}" for x in (0, 1, 3)]
    found = divergences(model, ["a", "b"], texts)
    assert model.batches == [(2, ["none"]), (2, texts)]
    assert [len(each) for each in found] == [2, 2, 2] and found[0] == [0, 0] and found[1][0] < found[2][0]
    monkeypatch.setattr(module, "MOST_REQUESTS", 4)
    assert divergences(model, ["a", "b"], texts) == found and model.batches[-2:] == [(2, texts[:2]), (2, texts[2:])]
    assert divergences(model, [], texts) == [[], [], []]


def test_prompts_are_those_of_the_controls_or_of_a_file(tmp_path: Path) -> None:
    tasks = ["steermoe_harmless", "steermoe_lab_digits"]
    options = Options(chat_template=False, samples={"steermoe_harmless": [3, 4, 5]})
    manager = task_manager(tasks, options)
    assert controls_among(manager, tasks) == ["steermoe_harmless"]
    source = prompt_source("controls", ["steermoe_harmless"])
    model = CannedLM(lambda *_: "")
    assert len(source.prompts(model, manager, options)) == 3 and source.identity == "controls"
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n")
    assert prompt_source(str(file), []).prompts(model, manager, options) == ["one", "two"]
    assert len(prompt_source(str(file), []).identity) == 64
    none = prompt_source("", ["steermoe_harmless"])
    assert not none and none.identity == "none" and none.prompts(model, manager, options) == []
    with pytest.raises(UsageError, match="no control task is named"):
        prompt_source("controls", [])
    with pytest.raises(SteerMoEError, match="cannot read"):
        prompt_source(str(tmp_path / "lost"), []).prompts(model, manager, options)
