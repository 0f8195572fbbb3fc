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
from benchmarks.gpu.reference import fault
from vllm_steermoe_plugin.device.kernels.counting import count
from vllm_steermoe_plugin.device.kernels.rewriting import launch, rewrite
from vllm_steermoe_plugin.device.kernels.tiles import Tile
from vllm_steermoe_plugin.device.kernels.warm_up import warm_up
from vllm_steermoe_plugin.device.rewrite import apply_rules

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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
    assert "59 of 59 checks passed" in text and "not measured: no GPU was used" in text


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
    assert len(document["checks"]) == 3 + 6 + 1 and document["missing"] == []
    assert len(document["microseconds_per_layer"]) == 2 and len(document["goals"]) == 4
    cold = "microseconds_over_an_empty_kernel_from_memory"
    assert len(document[cold]) == 1
    assert len(document["bytes"]) == 6 and len(document["host_microseconds"]) == 12
    assert sum(tile["chosen"] for tile in document["tiles"]) == 2 < len(document["tiles"])
    assert document["machine"]["triton"] == triton.__version__ and document["machine"]["gpu"] == "none"
    text = capsys.readouterr().out
    assert "| Mixtral-8x7B | 8 | bfloat16 |" in text and "NOT RUN" not in text
    lines = next(tmp_path.glob("*.jsonl")).read_text().splitlines()
    assert len(lines) == sum(len(document[of]) for of in ("checks", "microseconds_per_layer", cold, "bytes",
                                                          "host_microseconds", "tiles"))  # fmt: skip


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Logits `[T, E]` with ties, extremes and -inf, rules `[S, L, E]`, slots, a layer."""
    experts, tokens = draw(st.integers(1, 20)), draw(st.integers(1, 6))
    layers, slots = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    value = st.floats(-1, 1, width=32) | st.sampled_from([0.0, 1.0, -1.0, -float("inf")])
    rows = draw(st.lists(st.lists(value, min_size=experts, max_size=experts), min_size=tokens, max_size=tokens))
    logits = torch.tensor(rows) * draw(st.sampled_from([1e-6, 1.0, 30.0, 3000.0]))
    rule = st.lists(st.sampled_from([-1, 0, 0, 1]), min_size=experts, max_size=experts)
    tables = st.lists(st.lists(rule, min_size=layers, max_size=layers), min_size=slots, max_size=slots)
    rules = torch.tensor(draw(tables), dtype=torch.int8)
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
    rewrite(out, rules, slots, row, log_softmax)
    assert fault(logits, out, mine, log_softmax=log_softmax) is None
    plain = apply_rules(logits, mine, log_softmax=log_softmax)
    if not log_softmax:
        assert torch.equal(out.nan_to_num(7.0), plain.nan_to_num(7.0))
        return
    unit = torch.finfo(logits.dtype).eps
    torch.testing.assert_close(out.double(), plain.double(), rtol=2 * unit, atol=4e-6, equal_nan=True)


@pytest.mark.parametrize("tile", [Tile(1, 32, 1), Tile(4, 64, 2), Tile(16, 32, 4)])
def test_how_the_work_is_cut_changes_nothing(tile: Tile) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(37, 30, generator=generator)
    rules = torch.randint(-1, 2, (4, 2, 30), generator=generator).to(torch.int8)
    rules[0] = 0
    slots = torch.randint(0, 4, (37,), generator=generator).int()
    one, other = logits.clone(), logits.clone()
    rewrite(one, rules, slots, 1)
    launch(other, rules, slots, 1, tile)
    assert torch.equal(one, other)


def test_a_step_without_tokens_is_left_alone() -> None:
    rewrite(torch.empty(0, 8), torch.ones(2, 1, 8, dtype=torch.int8), torch.ones(4, dtype=torch.int32), 0)
    count(torch.empty(0, 2, dtype=torch.int32), torch.zeros(1, 2, 8, dtype=torch.int64), torch.ones(4).int(), 0)


def test_ids_outside_the_layer_are_written_nowhere() -> None:
    counters = torch.zeros(3, 3, 4, dtype=torch.int64)
    count(torch.tensor([[-1, 4], [1, 7]]), counters, torch.tensor([1, 2], dtype=torch.int32), 1)
    assert counters.nonzero().tolist() == [[1, 2, 1]]


def test_nothing_is_read_beyond_the_slots() -> None:
    marks = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="4 tokens, but slots for 3"):
        rewrite(torch.zeros(4, 8), torch.zeros(2, 1, 8, dtype=torch.int8), marks, 0)
    with pytest.raises(ValueError, match="4 tokens, but groups for 3"):
        count(torch.zeros(4, 2, dtype=torch.int32), torch.zeros(1, 2, 8, dtype=torch.int64), marks, 0)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="float64"):
        rewrite(torch.zeros(1, 4).double(), torch.zeros(2, 1, 4).char(), torch.zeros(1).int(), 0)


def test_warming_up_runs_and_changes_nothing() -> None:
    rules = torch.ones(3, 2, 16, dtype=torch.int8)
    counters = torch.zeros(2, 3, 16, dtype=torch.int64)
    warm_up(rules, torch.zeros(8, dtype=torch.int32), counters, torch.zeros(8, dtype=torch.int32), 2)
    assert not counters.any()
