"""On a GPU: what `make gpu-check` checks, without the times. Skipped, and counted, elsewhere.

Needs pytest, torch and Triton; the last test but one also pydantic.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu import graphs, memory
from benchmarks.gpu.correctness import Case, all_cases, all_counts, check_count, check_rewrite
from benchmarks.gpu.selections import all_cases as all_selections
from benchmarks.gpu.selections import check_reselect
from vllm_steermoe_plugin.device.ops import count_, rewrite_

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def rewrite(*given: Any, forces: bool = True) -> None:
    rewrite_(*given, False, forces)


def test_rewrite_equals_float64(device: torch.device) -> None:
    outcomes = [check_rewrite(rewrite, device, case) for case in all_cases()]
    assert [outcome for outcome in outcomes if not outcome.passed] == []


def test_count_equals_a_loop(device: torch.device) -> None:
    outcomes = [check_count(count_, device, *case) for case in all_counts()]
    assert [outcome for outcome in outcomes if not outcome.passed] == []


def test_a_corrected_selection_equals_float64(device: torch.device) -> None:
    from vllm_steermoe_plugin.device.kernels.reselecting import reselect

    outcomes = [check_reselect(reselect, device, case) for case in all_selections()]
    assert [outcome for outcome in outcomes if not outcome.passed] == []


def test_cuda_graphs_copies_in_flight_and_compile(device: torch.device) -> None:
    from benchmarks.gpu.warmed_up import check_warm_up

    outcomes = [check() for _, check in graphs.all_checks(device)]
    outcomes += [graphs.check_compile(device), check_warm_up(device)]
    assert [outcome for outcome in outcomes if not outcome.passed] == []


def test_buffers_take_what_is_counted(device: torch.device) -> None:
    for footprint in memory.measure(device):
        assert footprint.buffers <= footprint.allocated < footprint.buffers + (4 << 20)


def test_a_state_compiles_everything_before_a_capture(device: torch.device) -> None:
    pytest.importorskip("pydantic")
    from benchmarks.gpu.warmed_up import compiled_kernels
    from expert_registry import MoEShape
    from vllm_steermoe_plugin.device.kernels.warm_up import warm_up_counting, warm_up_gate
    from vllm_steermoe_plugin.device.steering_state import BatchRow, SteeringState
    from vllm_steermoe_plugin.steering.profile import SteeringProfile
    from vllm_steermoe_plugin.steering.wire import STEER_KEY

    shape = MoEShape("Qwen3MoeForCausalLM", (0, 1), 96, 4)
    state = SteeringState(shape, shape.layers, max_requests=4, max_tokens=2048, count_groups=2, device=device)
    warm_up_gate(state.rules, state.token_slots, state.active)
    warm_up_counting(state.counters, state.token_groups, shape.top_k)

    before = compiled_kernels()
    profile = SteeringProfile(activate=frozenset({(0, 1)}))
    state.admit("r", {STEER_KEY: profile.to_json()}, 3)
    state.begin_step([BatchRow("r", 0, 1000)])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for tokens in (1, 2, 16, 512, 513, 1000):
            for row in range(2):
                logits = torch.randn((tokens, 96), device=device).to(dtype)
                rewrite_(logits, state.rules, state.token_slots, state.active, row)
    for dtype in (torch.int32, torch.int64):
        count_(torch.zeros((16, 4), dtype=dtype, device=device), state.counters, state.token_groups, 1)
    assert compiled_kernels() == before


def test_a_case_that_is_wrong_is_found(device: torch.device) -> None:
    def lazy(logits: torch.Tensor, *rest: Any, forces: bool) -> None:
        rewrite(logits[:-1], *rest, forces=forces)

    assert not check_rewrite(lazy, device, Case(8, 16, 2, 2, torch.float32)).passed
