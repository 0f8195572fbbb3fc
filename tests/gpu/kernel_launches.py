"""How the kernels are launched, with a stand-in for the GPU's driver: Triton compiles for sm_90, and nothing is run.

Run by `test_kernels.py` in a process of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.driver import driver

from benchmarks.gpu.warmed_up import KERNELS, check_warm_up, compiled_kernels
from vllm_steermoe_plugin.device.kernels import warm_up as warming
from vllm_steermoe_plugin.device.kernels.reselecting import reselect
from vllm_steermoe_plugin.device.kernels.rewriting import rewrite
from vllm_steermoe_plugin.device.router_kind import RouterKind

CPU = torch.device("cpu")


class StandIn:
    """As much of Triton's CUDA driver as a launch asks for; remembers the grids."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, int, int]] = []
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, threads at most."""
        return 1, 1, 32, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda x, y, z, *_: self.grids.append((x, y, z))

    def __getattr__(self, name: str) -> Any:
        assert hasattr(CudaDriver, name), name
        raise AttributeError(f"{name} of Triton's driver has no stand-in")


@pytest.fixture(scope="module")
def stand_in() -> StandIn:
    """One for all: a kernel keeps the launcher with which it was compiled."""
    mine = StandIn()
    driver.set_active(mine)  # type: ignore[arg-type]
    return mine


def test_a_model_that_is_warmed_up_compiles_nothing_more(stand_in: StandIn) -> None:
    assert check_warm_up(CPU).fault is None
    # Two models, and biases alone for two, three dtypes, small and large steps; two corrections, likewise for two
    # kinds of ids; counting with three.
    assert compiled_kernels() == 4 * 3 * 2 + 2 * 3 * 2 * 2 + 3


@pytest.mark.parametrize(
    ("name", "some"), [("DTYPES", (torch.float32,)), ("_ID_DTYPES", (torch.int32,)), ("_STEPS", (1,))]
)
def test_a_warm_up_that_forgets_something_is_noticed(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, name: str, some: tuple[torch.dtype | int, ...]
) -> None:
    monkeypatch.setattr(warming, name, some)
    for kernel in KERNELS:
        kernel.device_caches.clear()
    assert "more kernels were compiled" in str(check_warm_up(CPU).fault)


@pytest.mark.parametrize(("tokens", "programs"), [(1, 1), (512, 128), (513, 65), (8192, 1024)])
def test_programs_cover_the_step(stand_in: StandIn, tokens: int, programs: int) -> None:
    stand_in.grids.clear()
    rules, slots = torch.zeros((2, 1, 128), dtype=torch.float16), torch.zeros(tokens, dtype=torch.int32)
    rewrite(torch.zeros((tokens, 128)), rules, slots, torch.zeros(1).byte(), 0)
    assert stand_in.grids == [(programs, 1, 1)]


@pytest.mark.parametrize(("tokens", "programs"), [(33, 33), (512, 512), (513, 65)])
def test_each_token_of_a_small_step_has_a_program_of_its_own_where_a_selection_is_corrected(
    stand_in: StandIn, tokens: int, programs: int
) -> None:
    stand_in.grids.clear()
    rules, slots = torch.zeros((2, 1, 64), dtype=torch.float16), torch.zeros(tokens + 7, dtype=torch.int32)
    chosen = torch.zeros((tokens, 4)), torch.zeros((tokens, 4), dtype=torch.int32)
    reselect(*chosen, torch.zeros((tokens, 64)), None, rules, slots, torch.zeros(1).byte(), 0, RouterKind("sigmoid"))
    assert stand_in.grids == [(programs, 1, 1)]
