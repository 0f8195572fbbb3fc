"""The rewrite of router logits: algebra, strictness in every dtype, and the slow oracle."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.oracle import rewrite_row
from tests.support.rounded import OUTERMOST, is_strict_in_bfloat16
from tests.support.routed import DTYPES, routed
from vllm_steermoe_plugin.device.rewrite import apply_rules, forcing
from vllm_steermoe_plugin.steering.rule_values import ACTIVATE, DEACTIVATE

FORMS = pytest.mark.parametrize("log_softmax", [False, True], ids=["raw", "log-probabilities"])
NEXT_FLOAT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@FORMS
@given(case=routed())
@settings(max_examples=300, deadline=None)
def test_activated_are_strictly_above_and_deactivated_strictly_below(
    case: tuple[torch.Tensor, torch.Tensor], log_softmax: bool
) -> None:
    logits, rules = case
    for row, rule in zip(
        apply_rules(logits, rules, log_softmax=log_softmax).double().tolist(), rules.tolist(), strict=True
    ):
        activated = [z for z, r in zip(row, rule, strict=True) if r > 0]
        deactivated = [z for z, r in zip(row, rule, strict=True) if r < 0]
        not_activated = [z for z, r in zip(row, rule, strict=True) if r <= 0]
        not_deactivated = [z for z, r in zip(row, rule, strict=True) if r >= 0]
        if activated and not_activated:
            assert min(activated) > max(not_activated)
        if deactivated and not_deactivated:
            assert max(deactivated) < min(not_deactivated)


@FORMS
@given(case=routed())
@settings(max_examples=300, deadline=None)
def test_equals_the_slow_oracle(case: tuple[torch.Tensor, torch.Tensor], log_softmax: bool) -> None:
    logits, rules = case
    result = apply_rules(logits, rules, log_softmax=log_softmax)
    unit = NEXT_FLOAT[logits.dtype]
    for row, out, rule in zip(logits.tolist(), result.tolist(), rules.tolist(), strict=True):
        expected = rewrite_row(row, {e: r for e, r in enumerate(rule) if r}, logits.dtype, log_softmax=log_softmax)
        for a, b in zip(out, expected, strict=True):
            # The oracle sums in float64 and steps with nextafter: one rounding and one step may differ.
            assert a == b or math.isclose(a, b, rel_tol=4 * unit, abs_tol=4e-6)


@FORMS
@given(case=routed())
@settings(max_examples=100, deadline=None)
def test_rows_without_a_rule_are_untouched_beside_rows_with_one(
    case: tuple[torch.Tensor, torch.Tensor], log_softmax: bool
) -> None:
    logits, rules = case
    rules[0] = 0
    result = apply_rules(logits, rules, log_softmax=log_softmax)
    assert torch.equal(result[0].view(torch.uint8), logits[0].view(torch.uint8))
    assert torch.equal(apply_rules(logits, torch.zeros_like(rules), log_softmax=log_softmax), logits)


@FORMS
@given(case=routed())
@settings(max_examples=100, deadline=None)
def test_steering_twice_selects_as_steering_once(case: tuple[torch.Tensor, torch.Tensor], log_softmax: bool) -> None:
    logits, rules = case
    once = apply_rules(logits, rules, log_softmax=log_softmax)
    twice = apply_rules(once, rules, log_softmax=log_softmax)
    assert torch.equal(
        (once[:, :, None] > once[:, None, :])[rules != 0], (twice[:, :, None] > twice[:, None, :])[rules != 0]
    )


def test_both_forms_are_the_papers_in_exact_arithmetic() -> None:
    """A softmax takes no notice of a shift: the same probabilities, and the same order."""
    logits = torch.randn(200, 12, dtype=torch.float64) * 4
    rules = forcing(torch.randint(-1, 2, logits.shape))
    papers = torch.tensor(
        [
            rewrite_row(row, {e: r for e, r in enumerate(rule) if r}, torch.float64, log_softmax=True)
            for row, rule in zip(logits.tolist(), rules.tolist(), strict=True)
        ],
        dtype=torch.float64,
    ).softmax(-1)
    for log_softmax in (False, True):
        ours = apply_rules(logits.float(), rules, log_softmax=log_softmax).double().softmax(-1)
        # float32 has 24 bits; logits of up to 20 have the last of them at 2**-20.
        torch.testing.assert_close(ours, papers, atol=0, rtol=2**-17)


@given(case=routed())
@settings(max_examples=100, deadline=None)
def test_logits_without_a_rule_keep_their_bits_beside_those_with_one(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, rules = case
    kept = rules == 0
    bits = {4: torch.int32, 2: torch.int16}[logits.element_size()]
    assert torch.equal(apply_rules(logits, rules).view(bits)[kept], logits.view(bits)[kept])


@FORMS
def test_top_k_obeys_the_extremes(log_softmax: bool) -> None:
    for top_k in [1, 2, 7]:
        for dtype in DTYPES:
            logits = (torch.randn(50, 8) * 20).to(dtype)
            activate_last_k = forcing(torch.tensor([0] * (8 - top_k) + [1] * top_k))
            deactivate_first = forcing(torch.tensor([-1] * (8 - top_k) + [0] * top_k))
            wanted = set(range(8 - top_k, 8))
            for rules in (activate_last_k, deactivate_first):
                chosen = apply_rules(logits, rules, log_softmax=log_softmax).topk(top_k, dim=-1).indices.tolist()
                assert all(set(row) == wanted for row in chosen)


@FORMS
def test_experts_that_the_model_masked_stay_masked(log_softmax: bool) -> None:
    logits = torch.tensor([[1.0, -math.inf, 0.5, 2.0]])
    result = apply_rules(logits, forcing(torch.tensor([-1, 0, 1, 0])), log_softmax=log_softmax)
    assert result[0, 1] == -math.inf and result[0, 0] == -math.inf
    assert result[0].argmax() == 2


@FORMS
def test_one_expert(log_softmax: bool) -> None:
    for rule in [1, -1, 0]:
        for dtype in DTYPES:
            assert (
                apply_rules(torch.tensor([[3.0]], dtype=dtype), forcing(torch.tensor([rule])), log_softmax=log_softmax)
                .isfinite()
                .all()
            )


@st.composite
def allowed(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], int]:
    """One token's logits `[E]`, a rule for each expert as a profile may ask for it, and K.

    Often at the limits: K activated, E - K deactivated, both, K = 1, K = E. Logits tie, are as large as the dtype holds
    apart, or are -inf (masked by the model) as long as K experts are left that are neither masked nor deactivated.
    """
    dtype = draw(st.sampled_from(DTYPES))
    experts = draw(st.integers(1, 16))
    top_k = draw(st.integers(1, experts))
    order = draw(st.permutations(range(experts)))
    activated = draw(st.sampled_from([0, top_k]) | st.integers(0, top_k))
    deactivated = draw(st.sampled_from([0, experts - top_k]) | st.integers(0, experts - top_k))
    deactivated = min(deactivated, experts - activated)
    rules = [0] * experts
    for expert in order[:activated]:
        rules[expert] = ACTIVATE
    for expert in order[experts - deactivated :]:
        rules[expert] = DEACTIVATE
    scale = draw(st.sampled_from([0.0, 1e-6, 1.0, 30.0, torch.finfo(dtype).max / 4]))
    value = st.sampled_from([0.0, 1.0, -1.0]) | st.floats(-1, 1, width=32)
    logits = torch.tensor([draw(value) * scale for _ in range(experts)], dtype=torch.float64).to(dtype)
    free = [expert for expert in order[activated : experts - deactivated]]
    masked = draw(st.integers(0, max(0, len(free) + activated - top_k)))
    logits[free[:masked]] = -math.inf
    return logits, rules, top_k


@FORMS
@given(case=allowed())
@settings(max_examples=500, deadline=None)
def test_whoever_breaks_ties_how_ever_the_top_k_obeys(
    case: tuple[torch.Tensor, list[int], int], log_softmax: bool
) -> None:
    logits, rules, top_k = case
    out = apply_rules(logits[None], forcing(torch.tensor(rules)), log_softmax=log_softmax)[0].double().tolist()
    assert not any(math.isnan(value) for value in out)
    for expert, rule in enumerate(rules):
        others = [value for other, value in enumerate(out) if other != expert]
        if rule > 0:
            assert sum(value >= out[expert] for value in others) < top_k, "an activated expert may be left out"
        if rule < 0:
            assert sum(value > out[expert] for value in others) >= top_k, "a deactivated expert may be selected"


@FORMS
@given(case=allowed())
@settings(max_examples=300, deadline=None)
def test_experts_without_a_rule_keep_their_order_and_their_ties(
    case: tuple[torch.Tensor, list[int], int], log_softmax: bool
) -> None:
    logits, rules, _ = case
    out = apply_rules(logits[None], forcing(torch.tensor(rules)), log_softmax=log_softmax)[0]
    free = [expert for expert, rule in enumerate(rules) if rule == 0]
    for one in free:
        for other in free:
            if logits[one] == logits[other]:
                assert out[one] == out[other]
            elif logits[one] < logits[other]:
                assert out[one] <= out[other]


@FORMS
@given(case=allowed())
@settings(max_examples=200, deadline=None)
def test_of_one_direction_all_get_the_same(case: tuple[torch.Tensor, list[int], int], log_softmax: bool) -> None:
    logits, rules, _ = case
    out = apply_rules(logits[None], forcing(torch.tensor(rules)), log_softmax=log_softmax)[0].tolist()
    for direction in (1, -1):
        assert len({value for value, rule in zip(out, rules, strict=True) if rule == direction}) <= 1


@FORMS
def test_with_k_of_one_the_activated_expert_is_the_only_first(log_softmax: bool) -> None:
    for dtype in DTYPES:
        for expert in range(8):
            rules = torch.zeros(8, dtype=torch.float16)
            rules[expert] = ACTIVATE
            out = apply_rules((torch.randn(20, 8) * 50).to(dtype), rules, log_softmax=log_softmax)
            assert torch.equal((out == out.amax(dim=1, keepdim=True)).sum(dim=1), torch.ones(20, dtype=torch.int64))
            assert (out.argmax(dim=1) == expert).all()


@FORMS
def test_an_expert_that_the_model_masked_can_be_activated(log_softmax: bool) -> None:
    out = apply_rules(torch.tensor([[1.0, -math.inf, 0.5]]), forcing(torch.tensor([0, 1, 0])), log_softmax=log_softmax)
    assert out.argmax() == 1 and out.isfinite().all()


@FORMS
def test_a_row_that_broke_down_stays_broken_and_alone(log_softmax: bool) -> None:
    for rule in [[1, 0, 0], [0, -1, 0], [0, 1, -1]]:
        for broken in [[math.inf, 1.0, 2.0], [math.nan, 1.0, 2.0], [-math.inf] * 3]:
            for dtype in DTYPES:
                sound = torch.tensor([0.5, -0.25, 1.0], dtype=dtype)
                rows = torch.stack([sound, torch.tensor(broken, dtype=dtype), sound])
                rules = forcing(torch.tensor([rule] * 3))
                out = apply_rules(rows, rules, log_softmax=log_softmax)
                assert out[1].isnan().all()
                assert torch.equal(out[[0, 2]], apply_rules(rows[[0, 2]], rules[:2], log_softmax=log_softmax))
                # Without a rule it is the model's own affair.
                # Without a rule it is the model's own affair.
                out = apply_rules(rows, torch.zeros_like(rules), log_softmax=log_softmax)
                assert torch.equal(out.view(torch.uint8), rows.view(torch.uint8))


@FORMS
@given(case=routed())
@settings(max_examples=50, deadline=None)
def test_strides_do_not_matter(case: tuple[torch.Tensor, torch.Tensor], log_softmax: bool) -> None:
    logits, rules = case
    spread = torch.zeros(logits.shape[1] * 2, logits.shape[0], dtype=logits.dtype)
    spread[::2] = logits.T
    assert torch.equal(
        apply_rules(spread[::2].T, rules, log_softmax=log_softmax), apply_rules(logits, rules, log_softmax=log_softmax)
    )


def margins_in_bfloat16(row: list[float]) -> tuple[float, float]:
    """What activated and deactivated logits become where bfloat16 selects, from float64 and the next bfloat16."""
    ends = torch.tensor([max(row), min(row)], dtype=torch.float64)
    beyond = torch.tensor([math.inf, -math.inf], dtype=torch.bfloat16)
    above, below = torch.nextafter(ends.bfloat16(), beyond).tolist()
    return max(max(row) + 0.01, above), min(min(row) - 0.01, below)


@FORMS
@given(case=routed())
@settings(max_examples=300, deadline=None)
def test_who_rounds_the_logits_to_bfloat16_obeys_too(
    case: tuple[torch.Tensor, torch.Tensor], log_softmax: bool
) -> None:
    logits, rules = case[0].float(), case[1]
    assert is_strict_in_bfloat16(apply_rules(logits, rules, log_softmax=log_softmax, bfloat16=True), rules)


@FORMS
def test_rounding_at_a_power_of_two_takes_no_margin_away(log_softmax: bool) -> None:
    rules = forcing(torch.tensor([1, -1, 0, 0, 0])).expand(len(OUTERMOST), -1)
    out = apply_rules(OUTERMOST, rules, log_softmax=log_softmax, bfloat16=True)
    assert is_strict_in_bfloat16(out, rules)
    assert log_softmax or not is_strict_in_bfloat16(apply_rules(OUTERMOST, rules), rules)


def test_margins_for_bfloat16_are_its_units_and_other_logits_keep_their_bits() -> None:
    rules = forcing(torch.tensor([1, -1, 0, 0, 0])).expand(len(OUTERMOST), -1)
    out = apply_rules(OUTERMOST, rules, bfloat16=True)
    assert torch.equal(out[:, 2:], OUTERMOST[:, 2:])
    for row, (above, below, *_) in zip(OUTERMOST.tolist(), out.tolist(), strict=True):
        wanted = margins_in_bfloat16(row)
        # At a power of two the unit towards zero is half of that away from it; the whole one is taken.
        assert math.isclose(above, wanted[0], rel_tol=2**-7) and above >= wanted[0] - abs(wanted[0]) * 2**-23
        assert math.isclose(below, wanted[1], rel_tol=2**-7) and below <= wanted[1] + abs(wanted[1]) * 2**-23
