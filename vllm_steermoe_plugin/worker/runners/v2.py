"""Model Runner V2: its official hook is the ModelState that a model may choose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from expert_registry.errors import CompatibilityError
from vllm_steermoe_plugin.compat.symbols.worker import (
    V2_ADD_REQUEST,
    V2_BATCH,
    V2_PREPARE_DUMMY,
    V2_PREPARE_INPUTS,
    V2_REMOVE_REQUEST,
    V2_REQUEST,
    V2_RESOLVE_STATE,
)
from vllm_steermoe_plugin.device.steering_state import BatchRow, SteeringState
from vllm_steermoe_plugin.worker.runners.guard import lift_guard


class _WithoutOwnState:
    """A model as vLLM would see it if it chose no ModelState itself: only its modules."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def modules(self) -> Iterator[Any]:
        yield from self._model.modules()


def steered_model_state(model: Any, vllm_config: Any, upstream: type | None, state: SteeringState | None) -> type:
    """The ModelState class that vLLM would take for `model`, reporting to its steering state.

    Args:
        model: the variant.
        vllm_config: the engine's configuration.
        upstream: the class that vLLM's own model class chooses; None if it leaves the choice to vLLM.
        state: None if steering is switched off.
    """
    for internal in (
        V2_ADD_REQUEST,
        V2_REMOVE_REQUEST,
        V2_PREPARE_INPUTS,
        V2_PREPARE_DUMMY,
        V2_BATCH,
        V2_REQUEST,
    ):
        internal.load()
    base: type = upstream or V2_RESOLVE_STATE.load()(vllm_config, _WithoutOwnState(model))
    return base if state is None else with_steering(base, state)


def with_steering(base: type, state: SteeringState) -> type:
    """Derive from a ModelState class so that `state` learns of requests and steps."""

    class SteeredModelState(base):  # type: ignore[misc]
        steermoe_state = state

        def __init__(self, vllm_config: Any, model: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(vllm_config, model, *args, **kwargs)
            # Only Model Runner V2 makes one, for the model that it has loaded.
            lift_guard(model)

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            params = new_req_data.sampling_params
            extra_args = params.extra_args if params is not None else None
            state.admit(new_req_data.req_id, extra_args, new_req_data.prompt_len)

        def remove_request(self, req_id: str) -> None:
            state.forget(req_id)
            super().remove_request(req_id)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
            begin_v2_step(state, input_batch)
            prepared: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
            return prepared

        def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
            state.clear_step()
            prepared: dict[str, Any] = super().prepare_dummy_inputs(num_reqs, num_tokens)
            return prepared

    return SteeredModelState


def reports_to(model_state: object, state: SteeringState) -> bool:
    """Whether a runner's ModelState is one that `with_steering` made for `state`."""
    return getattr(model_state, "steermoe_state", None) is state


def begin_v2_step(state: SteeringState, input_batch: Any) -> None:
    """Tell the state which requests are in an InputBatch, in order.

    Dummy batches carry made-up ids (`req_...`) that were never added; they are not steered.
    """
    ids = list(input_batch.req_ids)
    known = state.known_requests()
    if known.isdisjoint(ids):
        stranger = next((i for i in ids if not i.startswith("req_")), None)
        if stranger is not None:
            raise CompatibilityError(f"request {stranger!r} is in the batch but the ModelState was never told of it")
        state.clear_step()
        return
    starts = input_batch.query_start_loc_np
    state.begin_step(
        [
            BatchRow(request_id, int(input_batch.num_computed_tokens_np[i]), int(starts[i + 1] - starts[i]))
            for i, request_id in enumerate(ids)
        ]
    )
