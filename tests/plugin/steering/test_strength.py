"""From a ranking to biases: weights by score, the largest first, strength as a factor; and requests that name one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expert_registry import Recommended, Registry
from expert_registry.errors import ProfileError
from expert_registry.registry import publish
from expert_registry.weights import SCORES, weigh
from tests.support.made_rankings import make_ranking
from vllm_steermoe_plugin.steering.profile import SteeringProfile
from vllm_steermoe_plugin.steering.request import parse_request
from vllm_steermoe_plugin.steering.resolve import Resolved, resolve
from vllm_steermoe_plugin.steering.strength import bias_experts

RANKING = make_ranking()
OWN = np.zeros(RANKING.counts.activations_1.shape, dtype=np.float32)
OWN[0, 1], OWN[1, 0] = 2.0, -0.25
WITH_OWN = replace(
    RANKING, weights=OWN, card=RANKING.card.model_copy(update={"format_version": 2, "weights": "made up"})
)


def biases(profile: SteeringProfile) -> dict[tuple[int, int], float]:
    return {(layer, expert): bias for layer, expert, bias in profile.bias}


def test_weights_are_scores_over_the_largest() -> None:
    counts = RANKING.counts
    difference = counts.risk_difference()
    assert np.allclose(weigh(RANKING), difference / np.abs(difference).max())
    assert np.array_equal(weigh(RANKING, "sign"), np.sign(np.round(difference, 12)))
    for (row, expert), weight in np.ndenumerate(weigh(RANKING, "log_ratio")):
        rates = [(a[row, expert] + 0.5) / (n + 1) for a, n in zip(
            (counts.activations_1, counts.activations_2), counts.tokens.tolist(), strict=True)]  # fmt: skip
        assert np.sign(weight) == np.sign(np.log(rates[0] / rates[1]))
    assert all(np.abs(weigh(RANKING, by)).max() == 1 for by in SCORES if by != "own")
    assert np.array_equal(weigh(WITH_OWN), OWN) and np.array_equal(weigh(WITH_OWN, "own"), OWN)
    assert np.array_equal(weigh(WITH_OWN, "risk_difference"), weigh(RANKING))


def test_a_ranking_without_weights_or_without_a_difference_says_so() -> None:
    with pytest.raises(ProfileError, match="no weights of its own; there are risk_difference, log_ratio, sign"):
        weigh(RANKING, "own")
    counts = replace(RANKING.counts, activations_2=RANKING.counts.activations_1, tokens=RANKING.counts.tokens[[0, 0]])
    for by in SCORES[1:]:
        with pytest.raises(ProfileError, match="equally often"):
            weigh(replace(RANKING, counts=counts), by)


@pytest.mark.parametrize("by", SCORES[1:])
def test_a_bias_is_strength_times_weight_and_the_other_way_its_negative(by: Any) -> None:
    weights, layers = weigh(RANKING, by), RANKING.shape.layers
    for strength in (0.5, 2.0):
        wanted = {(layers[row], e): strength * w for (row, e), w in np.ndenumerate(weights) if np.float16(strength * w)}
        found = biases(bias_experts(RANKING, strength, by=by))
        assert found.keys() == wanted.keys()
        assert all(np.float16(found[cell]) == np.float16(wanted[cell]) for cell in wanted)
        away = biases(bias_experts(RANKING, -strength, by=by))
        assert away == {cell: -bias for cell, bias in found.items()}
    assert not bias_experts(RANKING, 0.0, by=by)


def test_only_the_largest_weights_are_taken_and_no_more_than_there_are() -> None:
    all_of_them = sorted(biases(bias_experts(RANKING, 4.0)).values(), key=abs, reverse=True)
    for top in (1, 3, len(all_of_them)):
        found = biases(bias_experts(RANKING, 4.0, top=top))
        assert sorted(map(abs, found.values()), reverse=True) == [abs(bias) for bias in all_of_them[:top]]
    with pytest.raises(ProfileError, match=f"top: 99 experts asked for.*{np.count_nonzero(weigh(RANKING))}"):
        bias_experts(RANKING, 1.0, top=99)
    assert biases(bias_experts(WITH_OWN, 0.5)) == {
        (RANKING.shape.layers[0], 1): 1.0,
        (RANKING.shape.layers[1], 0): -0.125,
    }
    with pytest.raises(ProfileError, match="from -16 to 16"):
        bias_experts(WITH_OWN, 9.0)


def asked(folder: Path, text: str) -> Resolved | None:
    return resolve(parse_request(text), [RANKING.card.model.id], RANKING.shape, Registry((folder,)))


def test_a_request_names_a_strength_and_its_source_says_it(tmp_path: Path) -> None:
    publish(RANKING, tmp_path)
    resolved = asked(tmp_path, "digits:strength=-0.5:top=3:by=sign:phase=prompt")
    assert resolved is not None
    assert resolved.profile == bias_experts(RANKING, -0.5, top=3, by="sign", phase="prompt")
    (source,) = resolved.sources
    assert (source.strength, source.top, source.by, source.reverse) == (-0.5, 3, "sign", True)
    assert asked(tmp_path, "digits:strength=0") is None
    forced = asked(tmp_path, "digits")
    assert forced is not None and not forced.profile.bias and forced.sources[0].strength is None


def test_a_card_may_recommend_a_strength_in_either_direction(tmp_path: Path) -> None:
    numbers = Recommended(activate=0, deactivate=0, strength=0.5, top=4)
    card = RANKING.card.model_copy(
        update={
            "format_version": 2,
            "recommended": numbers,
            "recommended_reverse": numbers.model_copy(update={"top": 2}),
        }
    )
    publish(replace(RANKING, card=card), tmp_path)
    for text, strength, top in (("digits", 0.5, 4), ("digits:reverse", -0.5, 2), ("digits:strength=2", 2.0, None)):
        resolved = asked(tmp_path, text)
        assert resolved is not None and resolved.profile == bias_experts(RANKING, strength, top=top)
    forced = asked(tmp_path, "digits:activate=1")
    assert forced is not None and len(forced.profile.activate) == 1 and not forced.profile.bias
