"""Biases of router logits: algebra, what they leave alone, and a slow loop in float64."""

from __future__ import annotations

import math
from statistics import fmean, pstdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.oracle import rewrite_row
from tests.support.routed import routed
from vllm_steermoe_plugin.device.rewrite import apply_rules
from vllm_steermoe_plugin.steering.rule_values import ACTIVATE, DEACTIVATE

EXPERTS = 12
SIGMA_ERROR = 2.0**-20
"""Of a float32 standard deviation of a dozen logits, in proportion to the largest: a few roundings of 2^-24."""
UNIT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def randn(seed: int, tokens: int = 20, scale: float = 3.0) -> torch.Tensor:
    return torch.randn((tokens, EXPERTS), generator=torch.Generator().manual_seed(seed)) * scale


def some_biases(seed: int, tokens: int = 20) -> torch.Tensor:
    """Multiples of 1/8, which float16 holds and adds exactly; half of them 0."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-32, 33, (tokens, EXPERTS), generator=generator) / 8
    return torch.where(torch.rand((tokens, EXPERTS), generator=generator) < 0.5, 0, drawn).half()


def slow_row(logits: list[float], rules: list[float], dtype: torch.dtype, *, log_softmax: bool) -> list[float]:
    """One token's rewrite in Python floats: biases rounded through `dtype`, then what is forced."""
    known = [z for z in logits if z > -math.inf]
    sigma = pstdev(known) if known else 0.0
    biased = [z + r * sigma if r and math.isfinite(r) else z for z, r in zip(logits, rules, strict=True)]
    rounded = torch.tensor(biased, dtype=torch.float64).to(dtype).tolist()
    forced = {e: int(math.copysign(1, r)) for e, r in enumerate(rules) if math.isinf(r)}
    return rewrite_row(rounded, forced, dtype, log_softmax=log_softmax)


@pytest.mark.parametrize("log_softmax", [False, True], ids=["raw", "log-probabilities"])
@given(case=routed(), seed=st.integers(0, 1000))
@settings(max_examples=300, deadline=None)
def test_equals_a_slow_loop_beside_rules_that_force(
    case: tuple[torch.Tensor, torch.Tensor], seed: int, log_softmax: bool
) -> None:
    logits, rules = case
    generator = torch.Generator().manual_seed(seed)
    biases = (torch.randn(rules.shape, generator=generator) * 2).half()
    rules = torch.where((rules == 0) & (torch.rand(rules.shape, generator=generator) < 0.5), biases, rules)
    result = apply_rules(logits, rules, log_softmax=log_softmax)
    if logits.dtype is torch.float16 and not result.isfinite().all():
        return  # A sum beyond the dtype: such a row is NaN, as another test says.
    for row, out, rule in zip(logits.tolist(), result.tolist(), rules.tolist(), strict=True):
        most = max((abs(r) for r in rule if math.isfinite(r)), default=0.0)
        error = 4e-6 + SIGMA_ERROR * (1 + most) * max(map(abs, row))
        for a, b in zip(out, slow_row(row, rule, logits.dtype, log_softmax=log_softmax), strict=True):
            assert a == b or math.isclose(a, b, rel_tol=4 * UNIT[logits.dtype], abs_tol=error)


@pytest.mark.parametrize("dtype", UNIT)
def test_a_bias_of_zero_and_a_logit_without_one_keep_their_bits(dtype: torch.dtype) -> None:
    logits, biases = randn(1).to(dtype), some_biases(2)
    logits[0, 0] = -0.0
    biases[0] = 0
    after = apply_rules(logits, biases)
    assert torch.equal(bits(after[biases == 0]), bits(logits[biases == 0]))
    assert torch.equal(bits(apply_rules(logits, biases * 0)), bits(logits))
    assert not torch.equal(after, logits)


def test_biases_add_up_and_a_bias_of_all_is_a_shift_that_a_softmax_does_not_see() -> None:
    logits, one, other = randn(3).double(), some_biases(4), some_biases(5)
    sigma = logits.std(dim=1, correction=0, keepdim=True)

    def moved(rules: torch.Tensor) -> torch.Tensor:
        return apply_rules(logits.float(), rules).double() - logits

    both = moved(one) + moved(other)
    torch.testing.assert_close(moved(one + other), both, rtol=0, atol=2.0**-18 * 16)
    everywhere = torch.full_like(one, 1.5)
    torch.testing.assert_close(moved(everywhere), (1.5 * sigma).expand_as(logits), rtol=0, atol=2.0**-18 * 16)
    before, after = logits.float().softmax(1), apply_rules(logits.float(), everywhere).softmax(1)
    torch.testing.assert_close(after, before, rtol=2.0**-16, atol=2.0**-20)


def test_scaled_or_shifted_logits_move_with_their_scale_and_not_with_their_shift() -> None:
    logits, biases = randn(6), some_biases(7)
    moved = apply_rules(logits, biases) - logits
    scaled = apply_rules(logits * 8, biases) - logits * 8
    torch.testing.assert_close(scaled, moved * 8, rtol=2.0**-18, atol=2.0**-18 * 64)
    shifted = apply_rules(logits + 64, biases) - (logits + 64)
    torch.testing.assert_close(shifted, moved, rtol=0, atol=2.0**-23 * 128 * 8)


def test_the_order_among_experts_of_the_same_bias_stays() -> None:
    logits, biases = randn(8), torch.full((20, EXPERTS), 2.0).half()
    biases[:, EXPERTS // 2 :] = -1
    after = apply_rules(logits, biases)
    for half in (slice(0, EXPERTS // 2), slice(EXPERTS // 2, None)):
        assert torch.equal(after[:, half].argsort(1), logits[:, half].argsort(1))
    assert after.argmax(1).lt(EXPERTS // 2).all() and after.argmin(1).ge(EXPERTS // 2).all()


def test_a_row_does_not_hang_on_its_neighbours() -> None:
    logits, biases = randn(9), some_biases(10)
    together = apply_rules(logits, biases)
    for t in range(len(logits)):
        assert torch.equal(apply_rules(logits[t : t + 1], biases[t : t + 1])[0], together[t])


def test_sigma_is_of_the_logits_that_are_there() -> None:
    row = [1.0, -math.inf, 3.0, -math.inf, 8.0, 0.5]
    after = apply_rules(torch.tensor([row]), torch.tensor([[1.0, 1, 0, 0, -2, 0]]).half())[0].tolist()
    sigma = pstdev([1.0, 3.0, 8.0, 0.5])
    assert after[1] == after[3] == -math.inf and after[2] == 3 and after[5] == 0.5
    assert after[0] == pytest.approx(1 + sigma) and after[4] == pytest.approx(8 - 2 * sigma)
    assert fmean(row[::2]) == 4  # Not the mean, but the spread, decides.


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_broke_down_is_not_made_to_look_sound(value: float) -> None:
    logits, biases = randn(11, tokens=3), some_biases(12, tokens=3)
    biases[:, 0] = 1
    biases[2] = 0
    logits[1:, 5] = value
    after = apply_rules(logits, biases)
    assert after[0].isfinite().all() and after[1].isnan().all()
    assert torch.equal(after[2].nan_to_num(7), logits[2].nan_to_num(7))
    alone = apply_rules(torch.full((1, EXPERTS), -math.inf), biases[:1])
    assert alone.isnan().all()


def test_a_sum_beyond_the_dtype_is_not_passed_on() -> None:
    logits = torch.tensor([[60000.0, -60000.0, 0.0, 0.0]], dtype=torch.float16)
    assert apply_rules(logits, torch.tensor([[16.0, 0, 0, 0]]).half()).isnan().all()


def test_where_a_selection_is_corrected_only_biases_reach_the_logits() -> None:
    logits, biases = randn(13), some_biases(14)
    mixed = biases.clone()
    mixed[:, 0], mixed[:, 1], mixed[5:] = ACTIVATE, DEACTIVATE, torch.tensor([ACTIVATE] + [0.0] * (EXPERTS - 1)).half()
    after = apply_rules(logits, mixed, forces=False)
    biases[:, :2], biases[5:] = 0, 0
    assert torch.equal(bits(after), bits(apply_rules(logits, biases)))
    assert torch.equal(bits(after[5:]), bits(logits[5:]))
    logits[5:, 3] = math.nan
    assert torch.equal(bits(apply_rules(logits, mixed, forces=False)[5:]), bits(logits[5:]))
