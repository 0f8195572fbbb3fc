"""Model Runner V2's adapter, with vLLM's own classes, on the CPU: add, step, finish, reorder, resume, pad, dummy."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelState

from expert_registry.errors import EngineError
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.device.steering_state import SteeringState
from vllm_steermoe_plugin.steering.wire import STEER_KEY
from vllm_steermoe_plugin.worker.runners.v2 import steered_model_state, with_steering

SHAPE = MoEShape("OlmoeForCausalLM", (0, 1), 4, 2)
MAX_TOKENS = 32


class PlainState(ModelState):
    """vLLM's interface with the least behind it; remembers what it was called with."""

    def __init__(self, *_: Any) -> None:
        self.calls: list[str] = []

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        self.calls.append(f"add {new_req_data.req_id}")

    def remove_request(self, req_id: str) -> None:
        self.calls.append(f"remove {req_id}")

    def prepare_inputs(self, input_batch: InputBatch, req_states: Any) -> dict[str, Any]:
        return {"prepared": True}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return {"dummy": True}

    def prepare_inputs_embeds(self, *args: Any) -> None:
        return None

    def prepare_attn(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}


@pytest.fixture
def state() -> SteeringState:
    return SteeringState(
        SHAPE, SHAPE.layers, max_requests=4, max_tokens=MAX_TOKENS, count_groups=0, device=torch.device("cpu")
    )


@pytest.fixture
def model_state(state: SteeringState) -> Any:
    return with_steering(PlainState, state)(None, torch.nn.Identity())


def new_request(req_id: str, steer: str | None, prompt_tokens: int = 4) -> NewRequestData:
    params = SamplingParams(extra_args={STEER_KEY: steer} if steer else None)
    return NewRequestData(
        req_id=req_id,
        prompt_token_ids=list(range(prompt_tokens)),
        mm_features=[],
        sampling_params=params,
        pooling_params=None,
        block_ids=([0],),
        num_computed_tokens=0,
        lora_request=None,
    )


def batch(rows: list[tuple[str, int, int]], padding: int = 0) -> InputBatch:
    """An InputBatch of (id, computed, scheduled) rows, built by vLLM's own constructor and then named."""
    tokens = sum(scheduled for _, _, scheduled in rows)
    buffers = InputBuffers(max_num_reqs=8, max_num_tokens=MAX_TOKENS, device=torch.device("cpu"))
    made = InputBatch.make_dummy(len(rows), tokens, buffers)
    made.req_ids = [req_id for req_id, _, _ in rows]
    made.num_computed_tokens_np = np.array([computed for _, computed, _ in rows])
    made.query_start_loc_np = np.concatenate([[0], np.cumsum([scheduled for _, _, scheduled in rows])])
    made.num_tokens_after_padding = tokens + padding
    return made


ACTIVATE = '{"activate": {"0": [3]}}'
DEACTIVATE = '{"deactivate": {"1": [0]}}'


def rules_by_token(state: SteeringState, tokens: int) -> list[list[float]]:
    """For each token the flattened rules `[L * E]` that the graph would read."""
    return [state.rules[slot].flatten().tolist() for slot in state.token_slots[:tokens].tolist()]


PLAIN = [0.0] * 8
ONE = [0, 0, 0, math.inf, 0, 0, 0, 0]
TWO = [0, 0, 0, 0, -math.inf, 0, 0, 0]


def test_each_token_gets_the_rules_of_its_request_in_any_order(model_state: Any, state: SteeringState) -> None:
    for index, (req_id, steer) in enumerate([("a", ACTIVATE), ("b", None), ("c", DEACTIVATE)]):
        model_state.add_request(index, new_request(req_id, steer))
    assert model_state.prepare_inputs(batch([("a", 0, 2), ("b", 0, 1), ("c", 0, 3)]), None) == {"prepared": True}
    assert rules_by_token(state, 6) == [ONE] * 2 + [PLAIN] + [TWO] * 3
    model_state.prepare_inputs(batch([("c", 3, 1), ("a", 2, 1), ("b", 1, 1)], padding=5), None)
    assert rules_by_token(state, 8) == [TWO, ONE, PLAIN] + [PLAIN] * 5, "padding must not be steered"


def test_finished_requests_leave_and_a_reused_id_is_not_steered(model_state: Any, state: SteeringState) -> None:
    model_state.add_request(0, new_request("a", ACTIVATE))
    model_state.prepare_inputs(batch([("a", 0, 4)]), None)
    model_state.remove_request("a")
    model_state.add_request(0, new_request("a", None))
    model_state.prepare_inputs(batch([("a", 0, 4)]), None)
    assert rules_by_token(state, 4) == [PLAIN] * 4
    assert model_state.calls == ["add a", "remove a", "add a"]


def test_resumed_request_is_steered_again(model_state: Any, state: SteeringState) -> None:
    model_state.add_request(0, new_request("a", ACTIVATE))
    model_state.remove_request("a")
    model_state.add_request(3, new_request("a", ACTIVATE))
    model_state.prepare_inputs(batch([("a", 0, 3)]), None)
    assert rules_by_token(state, 3) == [ONE] * 3
    assert state.steered_requests == 1, "one request, though announced twice"


def test_dummy_runs_are_not_steered(model_state: Any, state: SteeringState) -> None:
    model_state.add_request(0, new_request("a", ACTIVATE))
    model_state.prepare_inputs(batch([("a", 0, 4)]), None)
    buffers = InputBuffers(max_num_reqs=8, max_num_tokens=MAX_TOKENS, device=torch.device("cpu"))
    model_state.prepare_inputs(InputBatch.make_dummy(2, 8, buffers), None)
    assert rules_by_token(state, 8) == [PLAIN] * 8
    model_state.prepare_inputs(batch([("a", 4, 1)]), None)
    assert rules_by_token(state, 1) == [ONE]
    assert model_state.prepare_dummy_inputs(1, 8) == {"dummy": True}
    assert rules_by_token(state, 8) == [PLAIN] * 8


def test_a_request_that_was_never_announced_is_an_error(model_state: Any) -> None:
    with pytest.raises(EngineError, match="stranger"):
        model_state.prepare_inputs(batch([("stranger", 0, 2)]), None)
    model_state.add_request(0, new_request("a", None))
    with pytest.raises(EngineError, match="stranger"):
        model_state.prepare_inputs(batch([("a", 0, 1), ("stranger", 0, 2)]), None)


def test_a_variant_derives_its_state_from_the_one_that_vllm_would_choose(
    engines: Callable[..., Any], checkpoint: Callable[[str], Path]
) -> None:
    engine = engines(
        str(checkpoint("Qwen3MoeForCausalLM")), {"count_groups": 4}, dtype="float32", enable_prefix_caching=False
    )
    core = engine.llm_engine.engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.model
    cls = model.get_model_state_cls()
    assert issubclass(cls, DefaultModelState) and cls is not DefaultModelState
    config = engine.llm_engine.vllm_config
    assert steered_model_state(model, config, None, None) is DefaultModelState, "switched off means vLLM's own"
    chosen = steered_model_state(model, config, PlainState, model.steering_state)
    assert issubclass(chosen, PlainState), "a model's own choice is kept"


@pytest.mark.parametrize(("phase", "steered"), [("prompt", [ONE, ONE, PLAIN]), ("generation", [PLAIN, PLAIN, ONE])])
def test_a_phase_ends_where_the_prompt_does(
    phase: str, steered: list[list[int]], model_state: Any, state: SteeringState
) -> None:
    model_state.add_request(0, new_request("a", ACTIVATE[:-1] + f', "phase": "{phase}"}}', prompt_tokens=4))
    model_state.prepare_inputs(batch([("a", 2, 3)]), None)
    assert rules_by_token(state, 3) == steered
