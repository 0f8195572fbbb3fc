"""`make gpu-check` on a machine without a GPU: what it decides, what it writes, and that it never passes."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu import graphs, serve
from benchmarks.gpu.check import NOT_MEASURED, main, run_processes
from benchmarks.gpu.correctness import DTYPES, Case, all_cases, all_counts, check_count, check_rewrite
from benchmarks.gpu.goals import judge
from benchmarks.gpu.memory import Footprint
from benchmarks.gpu.models import MODELS
from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.parts import run_checks
from benchmarks.gpu.records import Record, read
from benchmarks.gpu.reference import expected, fault
from benchmarks.gpu.report import Report, make_report, write_report
from benchmarks.gpu.rows import ColdTime, HostTime, Row, SelectionRow, TileTime
from benchmarks.gpu.selection_reference import fault as selection_fault
from benchmarks.gpu.selection_reference import unsteered
from benchmarks.gpu.selections import all_cases as all_selections
from benchmarks.gpu.selections import check_reselect
from tests.support import selections
from tests.support.folders import ROOT
from tests.support.oracle import Router, rewrite_row
from tests.support.routed import routed
from vllm_steermoe_plugin.device.kernels.tiles import MAX_EXPERTS, SMALL_STEP, choose_tile
from vllm_steermoe_plugin.device.ops import count_, reselect_, rewrite_
from vllm_steermoe_plugin.device.reselect import reselect
from vllm_steermoe_plugin.device.rewrite import apply_rules, forcing
from vllm_steermoe_plugin.device.router_kind import RouterKind
from vllm_steermoe_plugin.steering.rule_values import OWN_WEIGHT

CPU = torch.device("cpu")


def plain_rewrite(*given: Any, forces: bool = True) -> None:
    """The plain PyTorch path, as a CPU runs it."""
    rewrite_(*given, False, forces)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so the check would run")
def test_without_a_gpu_it_says_so_and_does_not_pass(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path)]) == NOT_MEASURED == 2
    assert capsys.readouterr().out == "not measured: no GPU\n"
    assert not any(tmp_path.iterdir())


@given(routed(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_its_reference_is_the_slow_oracle(case: tuple[torch.Tensor, torch.Tensor], log_softmax: bool) -> None:
    logits, rules = case
    rewritten = expected(logits, rules, log_softmax=log_softmax).tolist()
    for row, found, rule in zip(logits.tolist(), rewritten, rules.tolist(), strict=True):
        wanted = rewrite_row(row, {e: r for e, r in enumerate(rule) if r}, logits.dtype, log_softmax=log_softmax)
        unit = torch.finfo(logits.dtype).eps
        assert all(math.isclose(a, b, rel_tol=2 * unit, abs_tol=1e-12) for a, b in zip(found, wanted, strict=True))


def of_the_loop(case: selections.Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids `[T, K]`, corrected by the loop in float64 where a rule is about what was selected."""
    weights, ids = case.weights.float(), case.ids.clone()
    for t, (row, rule) in enumerate(zip(case.logits.double().tolist(), case.rules.tolist(), strict=True)):
        rules = {e: r for e, r in enumerate(rule) if r}
        if any(r > 0 or e in case.ids[t].tolist() for e, r in rules.items()):
            steered = case.router.steer(row, rules, own=OWN_WEIGHT in rules.values())
            ids[t], weights[t] = torch.tensor(list(steered)), torch.tensor(list(steered.values()))
    return weights, ids


@given(selections.cases())
@settings(max_examples=200, deadline=None)
def test_its_reference_of_a_selection_takes_what_the_loop_says_and_nothing_else(case: selections.Case) -> None:
    before, after = (case.weights.float(), case.ids), of_the_loop(case)
    given = (case.logits, case.bias, case.rules, case.kind)
    assert selection_fault(before, after, *given) is None
    reference = unsteered(case.logits, case.bias, case.kind, case.router.top_k)
    clear = (reference.c.sort(dim=1).values.diff(dim=1) > reference.near.amax(dim=1, keepdim=True)).all(dim=1)
    for t, ids in enumerate(after[1].tolist()):
        others = sorted(set(range(case.logits.shape[1])) - set(ids))
        if clear[t] and not reference.unsure[t] and others:
            other = after[1].clone()
            other[t, -1] = others[0]
            assert selection_fault(before, (after[0], other), *given) is not None


def plain_reselect(
    weights: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    rules: torch.Tensor,
    slots: torch.Tensor,
    active: torch.Tensor,
    row: int,
    kind: RouterKind,
) -> None:
    """The plain PyTorch path, as a CPU runs it."""
    reselect_(weights, ids, logits, bias, rules, slots, active, row, *kind.arguments)


def test_the_plain_path_corrects_every_case() -> None:
    cases = [case for case in all_selections() if case.tokens < 100]
    assert {case.model.experts for case in cases} >= {8, 60, 160, 256, 384, 512} and len(cases) > 100
    assert [found for case in cases if not (found := check_reselect(plain_reselect, CPU, case)).passed] == []


def weaken(weights: torch.Tensor, ids: torch.Tensor) -> None:
    weights[0] *= 0.999


def turn(weights: torch.Tensor, ids: torch.Tensor) -> None:
    weights[0], ids[0] = weights[0].flip(0), ids[0].flip(0)


def repeat(weights: torch.Tensor, ids: torch.Tensor) -> None:
    ids[0, 1] = ids[0, 0]


def disobey(weights: torch.Tensor, ids: torch.Tensor) -> None:
    ids[0, -1] = 8


def touch(weights: torch.Tensor, ids: torch.Tensor) -> None:
    weights[1] *= 0.999


def mend(weights: torch.Tensor, ids: torch.Tensor) -> None:
    weights[2] = 0.25


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (weaken, "4 weights differ"),
        (turn, "does not hold"),
        (repeat, "selected twice"),
        (disobey, "does not hold"),
        (touch, "needs no change"),
        (mend, "broken row"),
    ],
)
def test_a_wrong_selection_is_found(spoil: Callable[[torch.Tensor, torch.Tensor], None], says: str) -> None:
    router = Router(top_k=4, bias=tuple([0.0] * 16), groups=4, kept=2)
    case = selections.drawn(router, tokens=3, seed=1, rules={3: 1, 8: -1})
    case.rules[1] = 0
    case.logits[2, 5] = torch.nan
    before, given = (case.weights.float(), case.ids), (case.logits, case.bias, case.rules, case.kind)
    after = reselect(*before, *given)
    assert selection_fault(before, after, *given) is None
    spoil(*after)
    assert says in str(selection_fault(before, after, *given))


def test_a_correction_that_writes_beside_the_selection_is_found() -> None:
    def wide(weights: torch.Tensor, ids: torch.Tensor, *rest: Any) -> None:
        plain_reselect(weights, ids, *rest)
        weights.as_strided((1,), (1,), weights.shape[1])[0] = 0.0

    (case, *_) = [case for case in all_selections() if case.beside]
    assert check_reselect(wide, CPU, case).fault == "memory beside the K was written"


def small_cases() -> Iterator[Case]:
    """Of the cases for a GPU those that a CPU can do in no time."""
    for case in all_cases():
        if case.tokens <= 9 and case.layers * case.experts < 1 << 14:
            yield replace(case, layers=min(case.layers, 3))


def test_the_plain_path_passes_every_small_case() -> None:
    outcomes = [check_rewrite(plain_rewrite, CPU, case) for case in small_cases()]
    outcomes += [check_count(count_, CPU, *case) for case in all_counts()]
    assert len(outcomes) > 300
    assert [outcome for outcome in outcomes if not outcome.passed] == []


def test_the_cases_for_a_gpu_cover_the_six_models_and_offsets_beyond_four_bytes() -> None:
    cases = list(all_cases())
    for model in MODELS:
        mine = [c for c in cases if (c.layers, c.experts, c.top_k) == (model.layers, model.experts, model.top_k)]
        assert {case.dtype for case in mine} == set(DTYPES)
        assert {case.tokens > SMALL_STEP for case in mine} == {True, False}
    assert any(4 * case.layers * case.experts > 2**31 for case in cases)


Break = Callable[[torch.Tensor, torch.Tensor], None]
"""Spoils logits `[T, E]` that were rewritten by rules `[T, E]`."""


def touch_idle_row(after: torch.Tensor, rules: torch.Tensor) -> None:
    after[0] += 0.0  # -0.0 becomes 0.0


def tie(after: torch.Tensor, rules: torch.Tensor) -> None:
    after[1] = torch.where(rules[1] > 0, after[1][rules[1] <= 0].max(), after[1])


def tie_below(after: torch.Tensor, rules: torch.Tensor) -> None:
    after[1] = torch.where(rules[1] < 0, after[1][rules[1] >= 0].min(), after[1])


def shift(after: torch.Tensor, rules: torch.Tensor) -> None:
    after[2] += 0.5


def lose_a_nan(after: torch.Tensor, rules: torch.Tensor) -> None:
    after[3] = 0.0


SPOILT: list[tuple[Break, str]] = [
    (touch_idle_row, "without a rule"),
    (tie, "differ|strictly first"),
    (tie_below, "differ|strictly last"),
    (shift, "differ|was changed"),
    (lose_a_nan, "differ"),
]


def test_what_is_wrong_is_found() -> None:
    for (spoil, says), dtype in itertools.product(SPOILT, DTYPES):
        logits = torch.tensor([[-0.0, 1, 2, 3], [1, 2, 3, 4], [0, 0, 1, 1], [math.nan, 1, 2, 3]]).to(dtype)
        rules = forcing(torch.tensor([[0, 0, 0, 0], [1, 0, 0, -1], [0, 1, 0, 0], [1, 0, 0, 0]]))
        after = apply_rules(logits, rules)
        assert fault(logits, after, rules) is None
        spoil(after, rules)
        assert any(part in str(fault(logits, after, rules)) for part in says.split("|")), (spoil, dtype)
    # bfloat16 at -6: eps is less than a unit, so only the strict order tells a tie.
    logits = torch.tensor([[-0.1, -6.0, -6.0, -6.0]]).bfloat16()
    for rules, tied, other, says in (([0, 0, 0, -1], 3, 1, "not strictly last"), ([1, 0, -1, -1], 1, 0, "")):
        after = apply_rules(logits, forcing(torch.tensor([rules])))
        assert fault(logits, after, forcing(torch.tensor([rules]))) is None
        after[0, tied] = after[0, other]
        found = fault(logits, after, forcing(torch.tensor([rules])))
        assert found is not None and says in found


class Replayed:
    """Stands in for a CUDA graph: runs the same work again."""

    def __init__(self, run: Callable[[], None]) -> None:
        run()
        self.replay = run


@pytest.fixture
def no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "capture", Replayed)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)


@pytest.mark.usefixtures("no_graphs")
def test_replays_follow_slots_rules_and_groups_and_what_shows_nothing_is_a_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert [graphs.check_replay(CPU, dtype).fault for dtype in DTYPES] == [None] * len(DTYPES)
    assert "no copy was in flight" in str(graphs.check_in_flight(CPU).fault)
    write = graphs.StepBuffers.write
    with monkeypatch.context() as patch:
        patch.setattr(
            graphs.StepBuffers, "write", lambda self, slots, groups, _, active: write(self, slots, groups, [], active)
        )
        assert graphs.check_replay(CPU, torch.float32).fault is not None, "rules that do not arrive"
    monkeypatch.setattr(graphs, "reselect_", lambda *_: None)
    assert graphs.check_replay(CPU, torch.float32).fault is not None, "selections that are not corrected"


def row(tokens: int = 1, **changed: float) -> Row:
    """A row that meets every goal by a hair."""
    times = {
        "empty": 1.5,
        "at_bandwidth": 1.0,
        "copy": 3.0,
        "idle": 3.5,
        "elsewhere": 4.0,
        "steered": 4.5,
        "biased": 4.5,
    }
    times |= {"count_idle": 3.0, "count": 3.0, "spread": 0.1} | ({"steered": 3.9} if tokens == 8192 else {})
    return Row(model="M", tokens=tokens, dtype="bfloat16", num_bytes=1000, **{**times, **changed})


def test_goals_are_judged_row_by_row() -> None:
    assert [goal.met for goal in judge([row(1), row(64), row(512), row(8192)])] == [True] * 7
    assert [goal.name for goal in judge([row(8192)])] == ["prefill"]
    for tokens, changed, name in [
        (1, "idle", "idle"),
        (64, "steered", "steered"),
        (8, "biased", "biased"),
        (8192, "steered", "prefill"),
    ]:
        slower = row(tokens)
        slower = replace(slower, **{changed: getattr(slower, changed) + 0.01})
        missed = [goal for goal in judge([slower]) if not goal.met]
        assert [goal.name for goal in missed] == [name] and str(missed[0]).startswith(f"NOT MET: {name}, M, T={tokens}")
        assert not any(goal.met for goal in judge([replace(slower, idle=math.nan, steered=math.nan, biased=math.nan)]))


MACHINE = {"gpu": "NVIDIA Test 9 (1 multiprocessors)", "date": "2026-01-02", "torch": "2.13"}


def report(*, fault: str | None = None, missing: Sequence[str] = (), **changed: float) -> Report:
    tile = TileTime(8, 64, "bfloat16", 16, 1, chosen=True, steered=2.0, idle=1.0)
    records: list[Record] = [
        row(1, **changed),
        row(8192),
        Outcome("one", fault),
        Footprint("M", 1 << 20, 1 << 21, 0),
        tile,
    ]
    records += [replace(tile, rows=8, warps=2, chosen=False, steered=1.5), HostTime("other slots", 64, 20.0)]
    records += [SelectionRow("M", 8, "float32", 1.0, 1.5, 1.25, 2.25, 9.75, 0.0, "1 MHz")]
    records += [ColdTime("M", 64, 2.25, 3.25), replace(row(1), model="OLMoE-1B-7B")]
    return make_report(MACHINE, records, missing)


def test_a_report_passes_only_if_all_was_checked_right_and_fast_enough(tmp_path: Path) -> None:
    assert report().passed
    assert not report(fault="wrong").passed and not report(idle=99.0).passed and not report(missing=["time"]).passed
    assert not replace(report(), outcomes=[]).passed and not replace(report(), rows=[]).passed
    text = write_report(report(fault="wrong", idle=99.0, missing=["tiles"]), tmp_path / "new")
    assert "FAILED one: wrong" in text and "NOT MET: idle, M, T=1" in text and "| M | 8192 |" in text
    assert "0 of 1 checks passed; 6 of 7 goals met" in text and "NOT RUN: tiles." in text
    assert "| 8 | 64 | bfloat16 | 16 x 1 | 2.00 | 1.00 | 8 x 2 | 1.50 | 1.00 |" in text
    assert "| other slots | 64 | 20 |" in text and "| M | 64 | 2.25 | 3.25 |" in text
    assert "| M | 8 | float32 | 1.00 | 1.25 | 2.25 | 9.75 | 1.50 | 0.00 | 1 MHz |" in text
    assert "| OLMoE-1B-7B | 1 | bfloat16 | 56 | 72 |" in text
    document = json.loads((tmp_path / "new" / "nvidia-test-9-2026-01-02.json").read_text())
    assert document["passed"] is False and document["microseconds_per_layer"][0]["idle"] == 99.0
    assert (tmp_path / "new" / "nvidia-test-9-2026-01-02.md").read_text() == text


DO_PART = """
import json, sys, time
_, name, share, shares, records = sys.argv[1:]
with open(records, "a") as file:
    file.write(json.dumps({"kind": "Outcome", "name": f"{name} {share} of {shares}"}) + "\\n")
if name == "hangs" and share == "1":
    time.sleep(600)
if name == "dies":
    sys.exit("the context is spoilt")
"""


def test_a_part_that_hangs_or_dies_costs_neither_the_rest_nor_what_it_has_found(tmp_path: Path) -> None:
    hung = ["stopped unfinished after 5 s"]
    for name, seconds, faults in (("works", 100, []), ("hangs", 5, hung), ("dies", 100, ["spoilt"] * 2)):
        records = tmp_path / name
        found = run_processes(name, 2, records, seconds, [sys.executable, "-c", DO_PART])
        assert len(found) == len(faults) and all(says in fault for says, fault in zip(faults, found, strict=True))
        written = {each.name for each in read(records) if isinstance(each, Outcome)}
        assert written == {f"{name} {i} of 2" for i in (0, 1)}


def test_a_check_that_raises_has_failed_and_too_many_end_a_part() -> None:
    def spoilt() -> Outcome:
        raise RuntimeError("an illegal memory access was encountered")

    found = list(run_checks([("good", lambda: Outcome("good")), *[("bad", spoilt)] * 50]))
    assert [outcome.passed for outcome in found] == [True] + [False] * 21
    assert "illegal memory access" in str(found[1].fault) and "20 have failed" in str(found[-1].fault)


def test_tiles_hold_a_row_and_fill_their_warps() -> None:
    steps, layers = (1, 64, SMALL_STEP, SMALL_STEP + 1, 8192), (1, 8, 60, 64, 128, 256, 384, 1000, MAX_EXPERTS)
    sizes = itertools.product(steps, layers)
    for tokens, experts in sizes:
        tile = choose_tile(experts, tokens)
        assert tile.experts >= experts > tile.experts // 2
        for power in (tile.tokens, tile.experts, tile.warps):
            assert power & (power - 1) == 0
        each = tile.tokens * tile.experts / (32 * tile.warps)
        assert each <= 16 and tile.warps <= 16 and (each >= 1 or experts == 1)
        assert tokens != 8192 or -(-tokens // tile.tokens) >= 256
    with pytest.raises(ValueError, match="1025 experts"):
        choose_tile(MAX_EXPERTS + 1, 1)


@pytest.mark.engine
@pytest.mark.nightly
def test_the_script_for_a_real_engine_runs_on_a_cpu_and_says_that_this_is_no_measurement(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Stock vLLM beside vLLM with the plugin: equal when off, steerable, and what routers chose."""
    options = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "gpu_memory_utilization": 0.2}
    arguments = [part for key, value in options.items() for part in ("--option", f"{key}={json.dumps(value)}")]
    few = ["--requests", "4", "--new-tokens", "6", "--rounds", "1", "--option", "max_model_len=512"]
    status = serve.main(["steermoe-lab", *few, *arguments, "--out", str(tmp_path / "report.md")])
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert "NO" not in text.replace("NONE", "") and text.count("* yes: ") == 10
    assert status == NOT_MEASURED and text.startswith("# CPU: not a GPU measurement")


@pytest.mark.engine
def test_it_needs_neither_vllm_nor_what_the_registry_needs() -> None:
    """A machine that is lent may have torch and Triton only."""
    block = "".join(f"sys.modules[{name!r}] = None; " for name in ("vllm", "pydantic", "safetensors", "rich", "typer"))
    script = f"import sys; {block}from benchmarks.gpu import check, graphs, memory, selections"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
