"""Weights of a ranking and a recommended strength: in its file, then of format version 2, and made of counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import save

from expert_registry import Ranking, RankingCard, Recommended
from expert_registry.errors import ProfileError, RankingFormatError
from expert_registry.format import CARD_KEY, dump_ranking, parse_ranking, read_card
from expert_registry.weights import MAX_WEIGHT, SCORES, Score, largest, weigh
from tests.support.made_rankings import make_ranking, with_weights
from tests.support.refusals import not_refused

PLAIN = make_ranking()
SHAPE = PLAIN.counts.activations_1.shape
STRONG = Recommended(activate=2, deactivate=2, strength=0.5, top=4, by="sign")
WEIGHTS = arrays.arrays(np.float32, SHAPE, elements=st.floats(-MAX_WEIGHT, MAX_WEIGHT, width=32)).filter(np.any)
NUMBERS = st.builds(
    lambda strength, top, by: Recommended(activate=2, deactivate=2, strength=strength, top=top, by=by),
    st.floats(0, 16, exclude_min=True),
    st.none() | st.integers(1, 18),
    st.none() | st.sampled_from(SCORES),
)


@given(WEIGHTS, st.none() | NUMBERS)
@settings(max_examples=50, deadline=None)
def test_weights_and_strength_make_the_round_trip(weights: np.ndarray, numbers: Recommended | None) -> None:
    ranking = with_weights(PLAIN, weights, recommended=numbers or PLAIN.card.recommended, recommended_reverse=numbers)
    data = dump_ranking(ranking)
    again = parse_ranking(data, "it")
    assert again.card == ranking.card and again.weights is not None and again.weights.dtype == np.float32
    assert again.weights.tobytes() == weights.tobytes()
    assert dump_ranking(again) == data


def test_a_strength_needs_no_weights() -> None:
    data = dump_ranking(make_ranking(format_version=2, recommended=STRONG))
    again = parse_ranking(data, "it")
    assert again.weights is None and again.card.recommended == STRONG
    assert dump_ranking(again) == data


def test_what_says_nothing_of_weights_is_written_as_before_there_were_any() -> None:
    data = dump_ranking(make_ranking(recommended_reverse=Recommended(activate=1, deactivate=0)))
    for word in (b"weights", b"strength", b"top\\", b"by\\", b"source"):
        assert word not in data
    assert b'format_version\\":1,' in data


def raw(weights: np.ndarray | None, recommended: dict[str, Any], card: dict[str, Any]) -> bytes:
    """A file with any weights and any card, as no writer of ours would leave it."""
    fields = PLAIN.card.model_dump(mode="json", exclude_none=True) | card
    fields["recommended"] = {"activate": 2, "deactivate": 2} | recommended
    counts = {name: getattr(PLAIN.counts, name) for name in ("activations_1", "activations_2", "tokens", "layers")}
    own = {} if weights is None else {"weights": weights}
    return save(counts | own, metadata={CARD_KEY: json.dumps(fields)})


def some(value: float = 1.0, dtype: type = np.float32, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Weights of 0.25, but for one."""
    weights = np.full(shape, 0.25, dtype=dtype)
    weights.flat[:1] = value
    return weights


V2, BY_HAND = {"format_version": 2}, {"weights": "by hand", "format_version": 2}
REFUSED: list[tuple[tuple[np.ndarray | None, dict[str, Any], dict[str, Any]], str]] = [
    *(((some(value), {}, BY_HAND), "-16 and 16") for value in (np.nan, np.inf, -np.inf, 16.01)),
    *(((some(dtype=dtype), {}, BY_HAND), "F32") for dtype in (np.float16, np.float64, np.int64)),
    *(((np.full(SHAPE, zero, np.float32), {}, BY_HAND), "not all be 0") for zero in (0.0, -0.0)),
    *(((some(shape=shape), {}, BY_HAND), r"float32 \(3, 6\)") for shape in ((3, 5), (6, 3), (0, 6), (18,), (3, 6, 1))),
    ((some(), {}, V2), "tensor `weights` without the text"),
    ((None, {}, BY_HAND), "text `weights` without the tensor"),
    ((some(), {}, {"weights": "by hand"}), "format version 1, but"),
    ((some(), {}, BY_HAND | {"format_version": 3}), "format_version"),
    ((some(), {}, V2 | {"weights": "\x1b[2J"}), r"weights.*U\+001B"),
    ((None, {}, V2), "format version 2, but"),
    ((None, {"strength": 0.5}, {}), "format version 1, but"),
    ((None, {"strength": 0.5, "by": "own"}, V2), "by=own"),
    ((None, {"strength": 0.5, "by": "magic"}, V2), r"recommended\.by"),
    *(((some(), more, BY_HAND), "need a strength") for more in ({"top": 3}, {"by": "sign"})),
    *(((None, {"strength": 1, "top": top}, V2), r"recommended\.top") for top in (0, 1.5, 1 << 40)),
    *(
        ((None, {"strength": strength}, V2), r"recommended\.strength")
        for strength in (0, -1, 16.5, float("nan"), float("inf"), "1", True)
    ),
]


def test_weights_and_strengths_that_no_ranking_has_are_refused_in_a_file() -> None:
    rows = ((raw(*parts), RankingFormatError, words) for parts, words in REFUSED)
    assert not_refused(lambda data: parse_ranking(data, "it"), rows) == []


WHOLE = dump_ranking(with_weights(PLAIN))


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
@settings(max_examples=500, deadline=None)
def test_a_damaged_file_is_refused_or_is_a_valid_ranking(at: int, byte: int) -> None:
    with pytest.raises(RankingFormatError, match="it"):
        parse_ranking(WHOLE[:at], "it")
    try:
        ranking = parse_ranking(WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :], "it")
    except RankingFormatError as error:
        assert "it" in str(error)
        return
    assert ranking.weights is not None and np.abs(ranking.weights).max() <= MAX_WEIGHT
    assert parse_ranking(dump_ranking(ranking), "again").card == ranking.card


UNWRITTEN: list[tuple[Ranking, str]] = [
    (with_weights(PLAIN, format_version=1), "format version 1, but"),
    (with_weights(PLAIN, some(np.nan)), "-16 and 16"),
    (with_weights(PLAIN, some(dtype=np.float64)), "float32"),
    (replace(with_weights(PLAIN), card=make_ranking(format_version=2).card), "tensor `weights` without"),
    (replace(with_weights(PLAIN), weights=None), "text `weights` without"),
    (make_ranking(format_version=2), "format version 2, but"),
    (make_ranking(recommended=STRONG), "format version 1, but"),
    (make_ranking(recommended_reverse=STRONG), "format version 1, but"),
]


def test_nothing_is_written_that_would_be_refused() -> None:
    assert not_refused(dump_ranking, ((ranking, RankingFormatError, words) for ranking, words in UNWRITTEN)) == []


def test_a_reader_of_version_1_refuses_a_file_of_version_2_by_its_card(tmp_path: Path) -> None:
    path = tmp_path / "v1.safetensors"
    path.write_bytes(dump_ranking(with_weights(PLAIN)))
    card = read_card(path)
    assert (card.format_version, card.weights) == (2, "by hand")
    assert RankingCard.model_fields["format_version"].default == 1


# --- made of counts ---------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.sampled_from(SCORES[1:]))
@settings(max_examples=50, deadline=None)
def test_weights_of_counts_have_the_sign_of_their_side_and_1_at_most(seed: int, by: Score) -> None:
    ranking = make_ranking(seed, tokens=(40, 40))
    weights, difference = weigh(ranking, by), ranking.counts.risk_difference()
    assert weights.shape == difference.shape and np.abs(weights).max() == 1
    # Of equally many tokens, a larger rate is a larger ratio of rates, too.
    assert np.array_equal(np.sign(weights), np.sign(np.round(difference, 12)))
    if by == "sign":
        assert set(np.abs(weights).flat) <= {0.0, 1.0}
    if by == "risk_difference":
        order = [abs(weights[ranking.shape.rows[e.layer], e.expert]) for e in ranking.experts()]
        assert order == sorted(order, reverse=True)


def test_a_rankings_own_weights_come_first_and_stand_as_they_are() -> None:
    ranking = with_weights(PLAIN)
    assert ranking.weights is not None
    for by in (None, "own"):
        assert np.array_equal(weigh(ranking, by), ranking.weights.astype(np.float64))
    assert np.array_equal(weigh(ranking, "sign"), weigh(PLAIN, "sign"))
    assert np.array_equal(weigh(PLAIN), weigh(PLAIN, "risk_difference"))


@given(st.integers(0, 1000), st.sampled_from(SCORES), st.integers(1, 18))
@settings(max_examples=50, deadline=None)
def test_the_largest_weights_come_first_and_of_equal_ones_those_of_the_ranking(seed: int, by: Score, top: int) -> None:
    ranking = with_weights(make_ranking(seed))
    weights = weigh(ranking, by)
    place = {(ranking.shape.rows[e.layer], e.expert): at for at, e in enumerate(ranking.experts())}
    wanted = sorted(np.argwhere(weights).tolist(), key=lambda cell: (-abs(weights[*cell]), place[*cell]))
    if top > len(wanted):
        with pytest.raises(ProfileError, match=f"top: {top} experts"):
            largest(ranking, weights, top)
    else:
        assert np.transpose(largest(ranking, weights, top)).tolist() == wanted[:top]
    assert np.transpose(largest(ranking, weights)).tolist() == wanted


def test_what_has_no_weights_is_refused_by_name() -> None:
    with pytest.raises(ProfileError, match="no weights of its own; there are risk_difference, log_ratio, sign"):
        weigh(PLAIN, "own")
    counts = replace(PLAIN.counts, activations_2=PLAIN.counts.activations_1, tokens=np.array([40, 40]))
    alike = replace(PLAIN, counts=counts)
    for by in SCORES[1:]:
        with pytest.raises(ProfileError, match="equally often"):
            weigh(alike, by)
