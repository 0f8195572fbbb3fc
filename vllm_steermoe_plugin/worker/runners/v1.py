"""The side road, Model Runner V1 (CPU, and what V2 does not do yet): it has no hook, so two methods are wrapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_steermoe_plugin.compat.internal import wrap_once
from vllm_steermoe_plugin.compat.symbols.worker import (
    V1_BATCH,
    V1_DUMMY_RUN,
    V1_PREPARE_INPUTS,
    V1_REQUEST,
    V1_RUNNER,
    V1_SCHEDULED,
)
from vllm_steermoe_plugin.device.steering_state import BatchRow, SteeringState
from vllm_steermoe_plugin.worker.runners.lookup import state_of


def install_v1_hooks() -> None:
    """Wrap `_prepare_inputs` and `_dummy_run`, once per process. Runners of other models are left alone."""
    for internal in (V1_RUNNER, V1_BATCH, V1_REQUEST, V1_SCHEDULED):
        internal.load()
    wrap_once(V1_PREPARE_INPUTS, _prepare_inputs)
    wrap_once(V1_DUMMY_RUN, _dummy_run)


def _prepare_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = original(self, scheduler_output, num_scheduled_tokens, *args, **kwargs)
        state = state_of(self)
        if state is not None:
            begin_v1_step(state, self, scheduler_output, num_scheduled_tokens)
        return prepared

    return prepare_inputs


def _dummy_run(original: Callable[..., Any]) -> Callable[..., Any]:
    def dummy_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = state_of(self)
        if state is not None:
            state.clear_step()
        return original(self, *args, **kwargs)

    return dummy_run


def begin_v1_step(state: SteeringState, runner: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> None:
    """Tell the state which requests are in the batch, in order."""
    for request_id in scheduler_output.finished_req_ids:
        state.forget(request_id)
    # A step without tokens does not come by here, so what ended in it is noticed now.
    if state.num_requests > len(runner.requests):
        for request_id in state.known_requests() - runner.requests.keys():
            state.forget(request_id)
    batch = runner.input_batch
    for request_id in batch.req_ids:
        request = runner.requests[request_id]
        # Pooling requests have no sampling parameters.
        extra_args = request.sampling_params.extra_args if request.sampling_params is not None else None
        state.admit(request_id, extra_args, request.num_prompt_tokens)
    if state.idle:
        state.clear_step()
        return
    state.begin_step(
        [
            BatchRow(request_id, int(batch.num_computed_tokens_cpu[index]), int(num_scheduled_tokens[index]))
            for index, request_id in enumerate(batch.req_ids)
        ]
    )
