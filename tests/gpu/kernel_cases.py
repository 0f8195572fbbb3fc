"""The Triton kernels in Triton's interpreter. Run by `test_kernels.py` in a process of its own."""

# The interpreter must be on before a kernel is imported.
# ruff: noqa: E402

from __future__ import annotations

from benchmarks.gpu.interpreter import round_to_bfloat16, use_interpreter
from tests.support.folders import ROOT

use_interpreter()

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu.check import FAILED, main, measure
from benchmarks.gpu.reference import SIGMA_ERROR, fault, what_rules_do
from benchmarks.gpu.selections import check_reselect, few_cases
from tests.support import selections
from tests.support.oracle import Router
from tests.support.rounded import OUTERMOST, is_strict_in_bfloat16
from vllm_steermoe_plugin.device.kernels.counting import count
from vllm_steermoe_plugin.device.kernels.reselecting import launch as launch_selection
from vllm_steermoe_plugin.device.kernels.reselecting import reselect
from vllm_steermoe_plugin.device.kernels.rewriting import launch, rewrite
from vllm_steermoe_plugin.device.kernels.tiles import MAX_EXPERTS, Tile
from vllm_steermoe_plugin.device.kernels.warm_up import warm_up_counting, warm_up_gate, warm_up_selection
from vllm_steermoe_plugin.device.reselect import reselect as plain_reselect
from vllm_steermoe_plugin.device.rewrite import apply_rules, forcing
from vllm_steermoe_plugin.device.router_kind import RouterKind
from vllm_steermoe_plugin.steering.rule_values import ACTIVATE, DEACTIVATE, FORCES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORCING = torch.tensor([FORCES], dtype=torch.uint8)
"""What the rules of one layer do."""


@given(st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=40))
def test_the_interpreter_rounds_bfloat16_as_torch_does(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    wanted = x.to(torch.bfloat16)
    found = torch.from_numpy(round_to_bfloat16(x.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(0).view(torch.int16), wanted.nan_to_num(0).view(torch.int16))


@pytest.mark.nightly
def test_the_kernels_equal_float64_and_the_check_says_that_it_measured_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Models' shapes, dtypes, strides, ties, -inf and NaN are in `benchmarks/gpu/correctness.py`."""
    status, text = main(["--interpret"]), capsys.readouterr().out
    assert status == 0, text
    assert "78 of 78 checks passed" in text and "not measured: no GPU was used" in text


PACKAGES = (
    "torch",
    "torchgen",
    "functorch",
    "triton",
    "numpy",
    "numpy.libs",
    "typing_extensions.py",
    "sympy",
    "mpmath",
)
PACKAGES += ("networkx", "jinja2", "markupsafe", "filelock", "fsspec")
"""torch, Triton, numpy, and what torch itself needs."""


def machine_that_is_lent(folder: Path) -> str:
    """A folder of packages in which there is nothing but torch and Triton."""
    folder.mkdir()
    for name in PACKAGES:
        found = next(path for entry in sys.path if (path := Path(entry) / name).exists())
        (folder / name).symlink_to(found)
    return str(folder)


@pytest.mark.nightly
def test_the_whole_check_with_stand_ins_for_what_only_a_gpu_has(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not a measurement: that every part of it runs, in processes of its own that find no other package than torch,
    and is written down."""
    monkeypatch.setenv("PYTHONPATH", machine_that_is_lent(tmp_path / "packages"))
    program = (sys.executable, "-S", str(ROOT / "tests/support/pretend_gpu.py"))
    assert measure(tmp_path, 400, program) == FAILED
    (path,) = tmp_path.glob("*.json")
    document = json.loads(path.read_text())
    # Copies are never in flight on a CPU, and that check must then not pass.
    assert [check["name"][:8] for check in document["checks"] if check["fault"]] == ["8 steps "]
    assert len(document["checks"]) == 4 + 6 + 1 and document["missing"] == []
    assert len(document["microseconds_per_layer"]) == 2 and len(document["goals"]) == 6
    cold, corrected = "microseconds_over_an_empty_kernel_from_memory", "microseconds_per_layer_of_a_correction"
    assert len(document[cold]) == len(document[corrected]) == 1
    assert len(document["bytes"]) == 6 and len(document["host_microseconds"]) == 12
    assert sum(tile["chosen"] for tile in document["tiles"]) == 2 < len(document["tiles"])
    assert document["machine"]["triton"] == triton.__version__ and document["machine"]["gpu"] == "none"
    text = capsys.readouterr().out
    assert "| Mixtral-8x7B | 8 | bfloat16 |" in text and "NOT RUN" not in text
    lines = next(tmp_path.glob("*.jsonl")).read_text().splitlines()
    assert len(lines) == sum(len(document[of]) for of in ("checks", "microseconds_per_layer", corrected, cold, "bytes",
                                                          "host_microseconds", "tiles"))  # fmt: skip


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Logits `[T, E]` with ties, extremes and -inf, rules `[S, L, E]`, slots, a layer."""
    experts, tokens = draw(st.integers(1, 20)), draw(st.integers(1, 6))
    layers, slots = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    value = st.floats(-1, 1, width=32) | st.sampled_from([0.0, 1.0, -1.0, -float("inf")])
    rows = draw(st.lists(st.lists(value, min_size=experts, max_size=experts), min_size=tokens, max_size=tokens))
    logits = torch.tensor(rows) * draw(st.sampled_from([1e-6, 1.0, 30.0, 3000.0]))
    rule = st.lists(st.sampled_from([DEACTIVATE, 0, 0, ACTIVATE, 0.5, -3]), min_size=experts, max_size=experts)
    tables = st.lists(st.lists(rule, min_size=layers, max_size=layers), min_size=slots, max_size=slots)
    rules = torch.tensor(draw(tables)).half()
    rules[0] = 0
    token_slots = torch.tensor(draw(st.lists(st.integers(0, slots - 1), min_size=tokens, max_size=tokens)))
    return logits.to(draw(st.sampled_from(DTYPES))), rules, token_slots.int(), draw(st.integers(0, layers - 1))


@given(batches(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_kernel_does_what_the_plain_path_does(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int], log_softmax: bool
) -> None:
    logits, rules, slots, row = case
    mine = rules[:, row][slots.long()]
    out = logits.clone()
    rewrite(out, rules, slots, what_rules_do(rules), row, log_softmax)
    assert fault(logits, out, mine, log_softmax=log_softmax) is None
    plain = apply_rules(logits, mine, log_softmax=log_softmax)
    if not log_softmax and not (mine.isfinite() & (mine != 0)).any():
        assert torch.equal(out.nan_to_num(7.0), plain.nan_to_num(7.0))
        return
    unit = torch.finfo(logits.dtype).eps
    # Of a standard deviation, times a bias of 3: see `SIGMA_ERROR`.
    error = 4e-6 + 4 * SIGMA_ERROR * float(logits.double().nan_to_num(0, 0, 0).abs().max())
    torch.testing.assert_close(out.double(), plain.double(), rtol=2 * unit, atol=error, equal_nan=True)


@given(batches())
@settings(max_examples=40, deadline=None)
def test_what_rounds_the_logits_to_bfloat16_still_obeys(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int],
) -> None:
    logits, rules, slots, row = case
    rules = rules.where(rules.isinf(), 0)
    mine = rules[:, row][slots.long()]
    out = logits.clone()
    rewrite(out, rules, slots, what_rules_do(rules), row, bfloat16=True)
    wanted = apply_rules(logits, mine, bfloat16=True)
    assert torch.equal(out.nan_to_num(7.0), wanted.nan_to_num(7.0))
    if logits.dtype is not torch.float16:
        assert is_strict_in_bfloat16(out, mine)


@pytest.mark.parametrize("log_softmax", [False, True])
def test_so_do_the_outermost_logits_beside_a_power_of_two(log_softmax: bool) -> None:
    rules = torch.zeros(2, 1, OUTERMOST.shape[1], dtype=torch.float16)
    rules[1, 0, 0], rules[1, 0, 1] = ACTIVATE, DEACTIVATE
    out = OUTERMOST[::9].clone()
    rewrite(out, rules, torch.ones(len(out), dtype=torch.int32), what_rules_do(rules), 0, log_softmax, bfloat16=True)
    assert is_strict_in_bfloat16(out, rules[1].expand(len(out), -1))


def correct(case: selections.Case, id_dtype: torch.dtype = torch.int32) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel makes of a case, in whose rules each token has a slot of its own; ids as int64."""
    tokens = len(case.rules)
    rules = torch.zeros(tokens + 1, 2, case.rules.shape[1], dtype=torch.float16)
    rules[1:, 1] = case.rules
    weights, ids = case.weights.float(), case.ids.to(id_dtype, copy=True)
    steering = (rules, torch.arange(1, tokens + 1).int(), what_rules_do(rules), 1)
    reselect(weights, ids, case.logits, case.bias, *steering, case.kind)
    return weights, ids.long()


@given(selections.cases(), st.sampled_from([torch.int32, torch.int64, torch.uint32]))
@settings(max_examples=60, deadline=None)
def test_a_corrected_selection_is_what_the_loop_and_the_plain_path_say(
    case: selections.Case, id_dtype: torch.dtype
) -> None:
    weights, ids = correct(case, id_dtype)
    assert selections.fault(case, weights, ids) is None
    plain = plain_reselect(case.weights.float(), case.ids, case.logits, case.bias, case.rules, case.kind)
    clear = [t for t, row in enumerate(case.logits.double().tolist()) if not selections.is_close(case.router, row)]
    assert torch.equal(ids[clear], plain[1][clear])
    torch.testing.assert_close(weights[clear], plain[0][clear], rtol=4e-6, atol=1e-7)


def test_models_shapes_dtypes_ties_and_what_lies_beside_the_selection() -> None:
    """E from 8 to 512, not all powers of two; K activated and E - K deactivated; -inf, NaN; slot 0."""
    outcomes = [check_reselect(reselect, torch.device("cpu"), case) for case in few_cases()]
    assert [outcome for outcome in outcomes if not outcome.passed] == []


GROUPED = Router(top_k=4, bias=tuple([0.0] * 16), groups=4, kept=2)


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 100.0), (30.0, 1.0), (30.0, 100.0)])
def test_saturated_scores_and_large_biases_keep_no_rule_from_holding(offset: float, scale: float) -> None:
    for rules, wanted in (
        ({0: 1, 5: 1, 9: 1, 15: 1, 2: -1}, [0, 5, 9, 15]),
        (dict.fromkeys(range(12), -1), [12, 13, 14, 15]),
    ):
        case = selections.drawn(GROUPED, tokens=8, seed=1, offset=offset, logits_scale=scale, rules=rules)
        assert correct(case)[1].sort(dim=1).values.tolist() == [wanted] * 8


def test_equal_scores_go_by_index() -> None:
    for value in (0.0, -0.0, 40.0, -200.0):
        rules = forcing(torch.tensor([[[0] * 8], [[0, -1, 0, 0, 0, 0, 1, 0]]]))
        ids = torch.tensor([[0, 1, 2]])
        reselect(torch.ones(1, 3), ids, torch.full((1, 8), value), None, rules, torch.ones(1).int(), FORCING, 0,
                 RouterKind("sigmoid"))  # fmt: skip
        assert ids.tolist() == [[6, 0, 2]]


def test_strides_do_not_matter() -> None:
    case = selections.drawn(GROUPED, tokens=5, seed=7, rules={3: 1, 8: -1})
    spread = torch.full((32, 5), 9.0)
    spread[::2] = case.logits.T
    apart = selections.replace(case, logits=spread[::2].T)
    assert all(torch.equal(a, b) for a, b in zip(correct(apart), correct(case), strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_row_gets_no_sound_weights_unless_it_has_no_rule(bad: float) -> None:
    case = selections.drawn(GROUPED, tokens=4, seed=5, rules={7: -1})
    case.logits[1:3, 4] = bad
    case.logits[3] = -torch.inf
    case.rules[2] = 0
    weights, ids = correct(case)
    assert weights.isnan().tolist() == [[broken] * 4 for broken in (False, True, False, True)]
    assert torch.equal(weights[2], case.weights[2].float()) and torch.equal(ids[1:], case.ids[1:])


@pytest.mark.parametrize("tile", [Tile(1, 32, 1), Tile(4, 64, 2), Tile(16, 32, 4)])
def test_how_the_work_is_cut_changes_nothing(tile: Tile) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(37, 30, generator=generator)
    rules = forcing(torch.randint(-1, 2, (4, 2, 30), generator=generator))
    rules[0] = 0
    slots = torch.randint(0, 4, (37,), generator=generator).int()
    one, other = logits.clone(), logits.clone()
    rewrite(one, rules, slots, what_rules_do(rules), 1)
    launch(other, rules, slots, what_rules_do(rules), 1, tile)
    assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [RouterKind("softmax"), RouterKind("sigmoid", True, 3, 2, True)])
def test_how_a_correction_is_cut_changes_nothing(kind: RouterKind) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(37, 30, generator=generator), torch.randn(30, generator=generator)
    logits[11, 3] = torch.nan
    rules = forcing(torch.randint(-1, 2, (4, 2, 30), generator=generator))
    rules[0] = 0
    # Tokens beyond T are steered, and not to be read.
    slots = torch.randint(0, 4, (40,), generator=generator).int()
    slots[8:16], slots[37:] = 0, 1
    weights, ids = torch.rand(37, 4, generator=generator), torch.arange(4).repeat(37, 1)
    one, other = (weights.clone(), ids.clone()), (weights.clone(), ids.clone())
    given = (logits, bias if kind.bias else None, rules, slots, what_rules_do(rules), 1, kind)
    reselect(*one, *given)
    launch_selection(*other, *given, Tile(8, 32 if kind.groups == 1 else 64, 8))
    assert torch.equal(one[0].nan_to_num(7.0), other[0].nan_to_num(7.0)) and torch.equal(one[1], other[1])
    assert not torch.equal(one[1], ids)


def test_a_step_without_tokens_is_left_alone() -> None:
    rewrite(torch.empty(0, 8), torch.ones(2, 1, 8, dtype=torch.float16), torch.ones(4, dtype=torch.int32), FORCING, 0)
    count(torch.empty(0, 2, dtype=torch.int32), torch.zeros(1, 2, 8, dtype=torch.int64), torch.ones(4).int(), 0)
    empty = torch.empty(0, 2), torch.empty(0, 2).int(), torch.empty(0, 8)
    reselect(
        *empty,
        None,
        torch.full((2, 1, 8), ACTIVATE, dtype=torch.float16),
        torch.ones(4).int(),
        FORCING,
        0,
        RouterKind("sigmoid"),
    )


def test_ids_outside_the_layer_are_written_nowhere() -> None:
    counters = torch.zeros(3, 3, 4, dtype=torch.int64)
    count(torch.tensor([[-1, 4], [1, 7]]), counters, torch.tensor([1, 2], dtype=torch.int32), 1)
    assert counters.nonzero().tolist() == [[1, 2, 1]]


def test_nothing_is_read_beyond_the_slots() -> None:
    marks = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="4 tokens, but slots for 3"):
        rewrite(torch.zeros(4, 8), torch.zeros(2, 1, 8, dtype=torch.float16), marks, FORCING, 0)
    with pytest.raises(ValueError, match="4 tokens, but groups for 3"):
        count(torch.zeros(4, 2, dtype=torch.int32), torch.zeros(1, 2, 8, dtype=torch.int64), marks, 0)
    with pytest.raises(ValueError, match="4 tokens, but slots for 3"):
        refused(torch.zeros(4, 2), torch.zeros(4, 8), marks)


def refused(weights: torch.Tensor, logits: torch.Tensor, slots: torch.Tensor) -> None:
    """A correction that cannot be made."""
    rules = torch.zeros(2, 1, logits.shape[1], dtype=torch.float16)
    reselect(weights, torch.zeros(len(logits), 2).int(), logits, None, rules, slots, FORCING, 0, RouterKind("sigmoid"))


def test_a_correction_refuses_what_it_could_not_read_or_write() -> None:
    with pytest.raises(ValueError, match="must be contiguous"):
        refused(torch.zeros(2, 4).T[:, :2], torch.zeros(4, 8), torch.zeros(4).int())
    with pytest.raises(ValueError, match=f"takes 1 to {MAX_EXPERTS}"):
        refused(torch.zeros(1, 2), torch.zeros(1, MAX_EXPERTS + 1), torch.zeros(1).int())


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="float64"):
        rewrite(torch.zeros(1, 4).double(), torch.zeros(2, 1, 4).half(), torch.zeros(1).int(), FORCING, 0)


def test_warming_up_runs_and_changes_nothing() -> None:
    rules = torch.full((3, 2, 16), ACTIVATE, dtype=torch.float16)
    counters = torch.zeros(2, 3, 16, dtype=torch.int64)
    slots = torch.zeros(8, dtype=torch.int32)
    active = what_rules_do(rules)
    warm_up_gate(rules, slots, active, bfloat16=True)
    warm_up_selection(rules, slots, active, 2, RouterKind("sigmoid", True, 4, 2), torch.zeros(16))
    warm_up_counting(counters, slots, 2)
    assert not counters.any()
