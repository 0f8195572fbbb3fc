"""The Triton kernels without a GPU: interpreted, and compiled for GPUs that are not here.

Both need Triton, which is kept out of the environment because vLLM behaves otherwise where it finds it: it lies in
`.cache` (`make triton`), and only the processes that these tests start see it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.support.alone import environment_alone
from tests.support.folders import ROOT
from tests.support.triton import triton_folder
from vllm_steermoe_plugin.device.rewrite import forcing


def run_with_triton(folder: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process of this repository that can import Triton."""
    environment = environment_alone(
        PYTHONPATH=os.pathsep.join([str(ROOT), folder]),
        TRITON_CACHE_DIR=str(cache),
        PYTHONWARNINGS="ignore",  # numpy's about NaN, which some cases are about.
    )
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


CASES = [
    ("kernel_cases.py", 25, "not nightly"),
    ("kernel_compiles.py", 11, "not nightly"),
    ("kernel_launches.py", 11, ""),
]
NIGHTLY = [("kernel_cases.py", 2, "nightly"), ("kernel_compiles.py", 63, "nightly")]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("cases", "least", "tier"), [*CASES, *(pytest.param(*case, marks=pytest.mark.nightly) for case in NIGHTLY)]
)
def test_every_case_passes(cases: str, least: int, tier: str, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    arguments = ("-m", "pytest", f"tests/gpu/{cases}", f"--junitxml={report}", "-p", "no:cacheprovider", "-m", tier)
    done = run_with_triton(triton_folder(), tmp_path / "triton", *arguments)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    suite = ElementTree.parse(report).getroot()[0]
    assert int(suite.attrib["tests"]) >= least
    assert [suite.attrib[name] for name in ("failures", "errors", "skipped")] == ["0", "0", "0"]


def test_triton_is_not_part_of_the_environment() -> None:
    """vLLM would switch features on, and torch its compiler's GPU path."""
    if not torch.cuda.is_available():
        assert find_spec("triton") is None


def test_a_gpu_gets_the_kernels_and_others_plain_torch() -> None:
    import vllm_steermoe_plugin.device.ops

    assert "triton" not in sys.modules or torch.cuda.is_available()
    for name in ("steermoe::rewrite_", "steermoe::reselect_", "steermoe::count_"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), vllm_steermoe_plugin.device.ops
        for key in ("CPU", "XPU"):
            assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd")


def test_the_operators_declare_what_they_change() -> None:
    """torch's own checks of schema, fake implementation and compiled use."""
    from vllm_steermoe_plugin.device.ops import count_, reselect_, rewrite_

    rules = forcing(torch.randint(-1, 2, (3, 2, 8)))
    slots = torch.tensor([0, 1, 2, 1, 0], dtype=torch.int32)
    active = torch.full((2,), 3, dtype=torch.uint8)
    ids = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(4, 8).to(dtype)
        torch.library.opcheck(rewrite_, (logits.clone(), rules, slots, active, 1))
        torch.library.opcheck(rewrite_, (logits.clone(), rules, slots, active, 1, False, True))
        for bias, id_dtype in ((None, torch.int64), (torch.randn(8), torch.int32)):
            chosen = torch.rand(4, 2), ids.to(id_dtype, copy=True)
            kind = ("sigmoid", 4, 2, True, 2.5)
            torch.library.opcheck(reselect_, (*chosen, logits, bias, rules, slots, active, 1, *kind))
    torch.library.opcheck(count_, (ids, torch.zeros(2, 3, 8, dtype=torch.int64), slots, 1))
