"""The rewrite of router logits: algebra, strictness in every dtype, and the slow oracle."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.oracle import rewrite_row
from tests.support.routed import DTYPES, routed
from vllm_steermoe_plugin.device.rewrite import apply_rules

NEXT_FLOAT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@given(routed())
@settings(max_examples=300, deadline=None)
def test_activated_are_strictly_above_and_deactivated_strictly_below(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, rules = case
    for row, rule in zip(apply_rules(logits, rules).double().tolist(), rules.tolist(), strict=True):
        activated = [z for z, r in zip(row, rule, strict=True) if r > 0]
        deactivated = [z for z, r in zip(row, rule, strict=True) if r < 0]
        not_activated = [z for z, r in zip(row, rule, strict=True) if r <= 0]
        not_deactivated = [z for z, r in zip(row, rule, strict=True) if r >= 0]
        if activated and not_activated:
            assert min(activated) > max(not_activated)
        if deactivated and not_deactivated:
            assert max(deactivated) < min(not_deactivated)


@given(routed())
@settings(max_examples=300, deadline=None)
def test_equals_the_slow_oracle(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, rules = case
    result = apply_rules(logits, rules)
    unit = NEXT_FLOAT[logits.dtype]
    for row, out, rule in zip(logits.tolist(), result.tolist(), rules.tolist(), strict=True):
        expected = rewrite_row(row, {e: r for e, r in enumerate(rule) if r}, logits.dtype)
        for a, b in zip(out, expected, strict=True):
            # The oracle sums in float64 and steps with nextafter: one rounding and one step may differ.
            assert a == b or math.isclose(a, b, rel_tol=4 * unit, abs_tol=4e-6)


@given(routed())
@settings(max_examples=100, deadline=None)
def test_rows_without_a_rule_are_untouched_beside_rows_with_one(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, rules = case
    rules[0] = 0
    result = apply_rules(logits, rules)
    assert torch.equal(result[0].view(torch.uint8), logits[0].view(torch.uint8))
    assert torch.equal(apply_rules(logits, torch.zeros_like(rules)), logits)


@given(routed())
@settings(max_examples=100, deadline=None)
def test_steering_twice_selects_as_steering_once(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, rules = case
    once = apply_rules(logits, rules)
    twice = apply_rules(once, rules)
    assert torch.equal(
        (once[:, :, None] > once[:, None, :])[rules != 0], (twice[:, :, None] > twice[:, None, :])[rules != 0]
    )


def test_a_shift_of_all_logits_changes_nothing() -> None:
    logits = torch.randn(5, 8)
    rules = torch.tensor([1, -1, 0, 0, 0, 0, 0, 0], dtype=torch.int8)
    torch.testing.assert_close(apply_rules(logits + 7.0, rules), apply_rules(logits, rules))


def test_top_k_obeys_the_extremes() -> None:
    for top_k in [1, 2, 7]:
        for dtype in DTYPES:
            logits = (torch.randn(50, 8) * 20).to(dtype)
            activate_last_k = torch.tensor([0] * (8 - top_k) + [1] * top_k, dtype=torch.int8)
            deactivate_first = torch.tensor([-1] * (8 - top_k) + [0] * top_k, dtype=torch.int8)
            wanted = set(range(8 - top_k, 8))
            for rules in (activate_last_k, deactivate_first):
                chosen = apply_rules(logits, rules).topk(top_k, dim=-1).indices.tolist()
                assert all(set(row) == wanted for row in chosen)


def test_experts_that_the_model_masked_stay_masked() -> None:
    logits = torch.tensor([[1.0, -math.inf, 0.5, 2.0]])
    result = apply_rules(logits, torch.tensor([-1, 0, 1, 0], dtype=torch.int8))
    assert result[0, 1] == -math.inf and result[0, 0] == -math.inf
    assert result[0].argmax() == 2


def test_one_expert() -> None:
    for rule in [1, -1, 0]:
        for dtype in DTYPES:
            assert (
                apply_rules(torch.tensor([[3.0]], dtype=dtype), torch.tensor([rule], dtype=torch.int8)).isfinite().all()
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
        rules[expert] = 1
    for expert in order[experts - deactivated :]:
        rules[expert] = -1
    scale = draw(st.sampled_from([0.0, 1e-6, 1.0, 30.0, torch.finfo(dtype).max / 4]))
    value = st.sampled_from([0.0, 1.0, -1.0]) | st.floats(-1, 1, width=32)
    logits = torch.tensor([draw(value) * scale for _ in range(experts)], dtype=torch.float64).to(dtype)
    free = [expert for expert in order[activated : experts - deactivated]]
    masked = draw(st.integers(0, max(0, len(free) + activated - top_k)))
    logits[free[:masked]] = -math.inf
    return logits, rules, top_k


@given(allowed())
@settings(max_examples=500, deadline=None)
def test_whoever_breaks_ties_how_ever_the_top_k_obeys(case: tuple[torch.Tensor, list[int], int]) -> None:
    logits, rules, top_k = case
    out = apply_rules(logits[None], torch.tensor(rules, dtype=torch.int8))[0].double().tolist()
    assert not any(math.isnan(value) for value in out)
    for expert, rule in enumerate(rules):
        others = [value for other, value in enumerate(out) if other != expert]
        if rule > 0:
            assert sum(value >= out[expert] for value in others) < top_k, "an activated expert may be left out"
        if rule < 0:
            assert sum(value > out[expert] for value in others) >= top_k, "a deactivated expert may be selected"


@given(allowed())
@settings(max_examples=300, deadline=None)
def test_experts_without_a_rule_keep_their_order_and_their_ties(case: tuple[torch.Tensor, list[int], int]) -> None:
    logits, rules, _ = case
    out = apply_rules(logits[None], torch.tensor(rules, dtype=torch.int8))[0]
    free = [expert for expert, rule in enumerate(rules) if rule == 0]
    for one in free:
        for other in free:
            if logits[one] == logits[other]:
                assert out[one] == out[other]
            elif logits[one] < logits[other]:
                assert out[one] <= out[other]


@given(allowed())
@settings(max_examples=200, deadline=None)
def test_of_one_direction_all_get_the_same(case: tuple[torch.Tensor, list[int], int]) -> None:
    logits, rules, _ = case
    out = apply_rules(logits[None], torch.tensor(rules, dtype=torch.int8))[0].tolist()
    for direction in (1, -1):
        assert len({value for value, rule in zip(out, rules, strict=True) if rule == direction}) <= 1


def test_with_k_of_one_the_activated_expert_is_the_only_first() -> None:
    for dtype in DTYPES:
        for expert in range(8):
            rules = torch.zeros(8, dtype=torch.int8)
            rules[expert] = 1
            out = apply_rules((torch.randn(20, 8) * 50).to(dtype), rules)
            assert torch.equal((out == out.amax(dim=1, keepdim=True)).sum(dim=1), torch.ones(20, dtype=torch.int64))
            assert (out.argmax(dim=1) == expert).all()


def test_an_expert_that_the_model_masked_can_be_activated() -> None:
    out = apply_rules(torch.tensor([[1.0, -math.inf, 0.5]]), torch.tensor([0, 1, 0], dtype=torch.int8))
    assert out.argmax() == 1 and out.isfinite().all()


def test_a_row_that_broke_down_stays_broken_and_alone() -> None:
    for rule in [[1, 0, 0], [0, -1, 0], [0, 1, -1]]:
        for broken in [[math.inf, 1.0, 2.0], [math.nan, 1.0, 2.0], [-math.inf] * 3]:
            for dtype in DTYPES:
                sound = torch.tensor([0.5, -0.25, 1.0], dtype=dtype)
                rows = torch.stack([sound, torch.tensor(broken, dtype=dtype), sound])
                rules = torch.tensor([rule] * 3, dtype=torch.int8)
                out = apply_rules(rows, rules)
                assert out[1].isnan().all()
                assert torch.equal(out[[0, 2]], apply_rules(rows[[0, 2]], rules[:2]))
                # Without a rule it is the model's own affair.
                # Without a rule it is the model's own affair.
                assert torch.equal(apply_rules(rows, rules * 0).view(torch.uint8), rows.view(torch.uint8))


@given(routed())
@settings(max_examples=50, deadline=None)
def test_strides_do_not_matter(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, rules = case
    spread = torch.zeros(logits.shape[1] * 2, logits.shape[0], dtype=logits.dtype)
    spread[::2] = logits.T
    assert torch.equal(apply_rules(spread[::2].T, rules), apply_rules(logits, rules))
