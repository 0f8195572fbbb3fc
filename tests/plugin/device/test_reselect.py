"""The correction of a selection, against a loop in float64 that fills one place after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from tests.support.oracle import Router
from tests.support.selections import Case, cases, drawn, fault, selection_of
from vllm_steermoe_plugin.device.ops import reselect_
from vllm_steermoe_plugin.device.reselect import reselect
from vllm_steermoe_plugin.device.rewrite import forcing
from vllm_steermoe_plugin.device.router_kind import RouterKind
from vllm_steermoe_plugin.steering.rule_values import ACTIVATE, DEACTIVATE, OWN_WEIGHT

GROUPED = Router(top_k=4, bias=tuple([0.0] * 16), groups=4, kept=2)


def corrected(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return reselect(case.weights, case.ids, case.logits, case.bias, case.rules, case.kind)


@given(cases())
@settings(max_examples=300, deadline=None)
def test_every_row_is_what_the_loop_says(case: Case) -> None:
    assert fault(case, *corrected(case)) is None


@given(cases())
@settings(max_examples=100, deadline=None)
def test_every_rule_holds_in_every_dtype_and_unruled_rows_keep_their_bits(case: Case) -> None:
    weights, ids = corrected(case)
    for t, rules in enumerate(case.rules.tolist()):
        selected = ids[t].tolist()
        assert len(set(selected)) == case.router.top_k
        assert all(e in selected for e, rule in enumerate(rules) if rule > 0)
        assert not any(e in selected for e, rule in enumerate(rules) if rule < 0)
        if not any(rules):
            assert torch.equal(weights[t], case.weights[t]) and torch.equal(ids[t], case.ids[t])


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_saturated_scores_and_large_biases_keep_no_rule_from_holding(offset: float, scale: float) -> None:
    """Four activated in four groups, of which two are kept; their scores and all others' are 1 in float32."""
    case = drawn(GROUPED, tokens=64, seed=1, offset=offset, logits_scale=scale, rules={0: 1, 5: 1, 9: 1, 15: 1, 2: -1})
    _, ids = corrected(case)
    assert all(sorted(row) == [0, 5, 9, 15] for row in ids.tolist())
    case = drawn(GROUPED, tokens=64, seed=1, offset=offset, logits_scale=scale, rules=dict.fromkeys(range(12), -1))
    _, ids = corrected(case)
    assert all(sorted(row) == [12, 13, 14, 15] for row in ids.tolist())


def test_equal_scores_go_by_index() -> None:
    logits = torch.zeros(1, 8)
    rules = forcing(torch.tensor([[0, -1, 0, 0, 0, 0, 1, 0]]))
    weights, ids = torch.full((1, 3), 1 / 3), torch.tensor([[0, 1, 2]])
    new, order = reselect(weights, ids, logits, None, rules, RouterKind("sigmoid", renormalize=True))
    assert order.tolist() == [[6, 0, 2]]
    top = torch.sigmoid(torch.tensor(0.01)).item()
    torch.testing.assert_close(new, torch.tensor([[top, 0.5, 0.5]]) / (top + 1))


def test_a_substitute_comes_from_the_kept_groups_and_the_weakest_choice_goes() -> None:
    # Groups of two: {0, 1} and {2, 3} are kept; 5 scores above 1, but its group is not kept.
    logits = torch.tensor([[3.0, -2.0, 2.5, 2.0, -9.0, 1.0]])
    kind = RouterKind("sigmoid", groups=3, kept=2)
    weights, ids = torch.sigmoid(torch.tensor([[3.0, 2.5]])), torch.tensor([[0, 2]])
    _, without = reselect(weights, ids, logits, None, forcing(torch.tensor([[-1, 0, 0, 0, 0, 0]])), kind)
    assert without.tolist() == [[2, 3]]
    _, without = reselect(weights, ids, logits, None, forcing(torch.tensor([[-1, 0, 0, -1, 0, 0]])), kind)
    assert without.tolist() == [[2, 1]]
    new, with_last = reselect(weights, ids, logits, None, forcing(torch.tensor([[0, 0, 0, 0, 1, 0]])), kind)
    assert with_last.tolist() == [[4, 0]]
    torch.testing.assert_close(new, torch.sigmoid(torch.tensor([[3.01, 3.0]])))


def test_an_expert_with_its_own_weight_is_selected_and_weighs_what_the_router_gives_it() -> None:
    case = drawn(GROUPED, tokens=20, seed=3, rules={7: OWN_WEIGHT, 1: DEACTIVATE})
    assert fault(case, *corrected(case)) is None
    weights, ids = corrected(case)
    u = torch.sigmoid(case.logits.float())
    for t in range(20):
        experts = ids[t].tolist()
        expected = u[t, experts] / u[t, experts].sum()
        torch.testing.assert_close(weights[t], expected)
        assert 7 in experts


def test_a_row_whose_own_choice_obeys_is_not_computed_again() -> None:
    case = drawn(GROUPED, tokens=40, seed=6, rules={2: -1})
    marked = replace(case, weights=case.weights + 1)
    weights, ids = corrected(marked)
    obeys = (case.ids != 2).all(dim=1)
    assert 0 < int(obeys.sum()) < 40
    assert torch.equal(weights[obeys], marked.weights[obeys]) and torch.equal(ids[obeys], case.ids[obeys])
    assert not torch.equal(weights, marked.weights)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_row_gets_no_sound_weights(bad: float) -> None:
    case = drawn(GROUPED, tokens=3, seed=5, rules={7: 1})
    case.logits[1, 4] = bad
    weights, ids = corrected(case)
    assert weights[1].isnan().all() and not weights[0].isnan().any() and not weights[2].isnan().any()
    assert torch.equal(ids[1], case.ids[1])
    case = drawn(GROUPED, tokens=1, seed=5, rules={})
    case.logits[0, 4] = bad
    assert torch.equal(corrected(case)[0], case.weights)


def test_a_row_of_nothing_but_minus_infinity_is_broken_and_one_such_expert_is_not() -> None:
    case = drawn(GROUPED, tokens=2, seed=5, rules={7: 1})
    case.logits[0] = -torch.inf
    case.logits[1, 3] = -torch.inf
    weights, _ = corrected(selection_of(case, case.logits))
    assert weights[0].isnan().all() and not weights[1].isnan().any()


def test_the_operator_corrects_the_tokens_of_a_slot_in_place_and_no_other() -> None:
    case = drawn(GROUPED, tokens=6, seed=2, rules={3: 1})
    rules = torch.zeros(3, 2, 16, dtype=torch.float16)
    rules[2, 1, 3] = ACTIVATE
    slots, active = torch.tensor([0, 2, 1, 2, 0, 2, 0, 0], dtype=torch.int32), torch.tensor([False, True])
    columns = torch.zeros(6, 5), torch.full((6, 5), 99, dtype=torch.int32)
    weights, ids = columns[0][:, :4], columns[1][:, :4]
    weights.copy_(case.weights)
    ids.copy_(case.ids)
    kind = case.kind
    reselect_(weights, ids, case.logits, case.bias, rules, slots, active, 0, *kind.arguments)
    assert torch.equal(weights, case.weights) and torch.equal(ids.long(), case.ids.long())
    reselect_(weights, ids, case.logits, case.bias, rules, slots, active, 1, *kind.arguments)
    wanted = corrected(case)
    for t in range(6):
        steered = slots[t] == 2
        assert torch.equal(weights[t], (wanted[0] if steered else case.weights)[t])
        assert ids[t].tolist() == (wanted[1] if steered else case.ids)[t].tolist()
    # What a router puts beside the K, such as shared experts, stays.
    assert (columns[1][:, 4] == 99).all() and (columns[0][:, 4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint32])
def test_ids_have_whatever_integer_type_the_kernels_want(dtype: torch.dtype) -> None:
    case = drawn(GROUPED, tokens=4, seed=2, rules={3: 1})
    ids = case.ids.to(dtype)
    _, found = reselect(case.weights, ids, case.logits, case.bias, case.rules, case.kind)
    assert found.dtype == dtype and found.long().tolist() == corrected(case)[1].tolist()


def test_where_the_gate_would_do_the_result_is_the_same() -> None:
    """Softmax without groups: one definition covers both seams."""
    from vllm_steermoe_plugin.device.rewrite import apply_rules

    case = drawn(Router(top_k=4, score="softmax", renormalize=True), tokens=50, seed=4, rules={3: 1, 9: 1, 5: -1})
    weights, ids = corrected(case)
    steered = apply_rules(case.logits, case.rules).softmax(-1).topk(4)
    for t in range(50):
        ours = dict(zip(ids[t].tolist(), weights[t].tolist(), strict=True))
        gate = dict(
            zip(steered.indices[t].tolist(), (steered.values[t] / steered.values[t].sum()).tolist(), strict=True)
        )
        assert ours == pytest.approx(gate, abs=1e-6)
