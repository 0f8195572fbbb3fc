"""Put the front end in vLLM's way: every request of every entry point passes `process_inputs`.

Before that vLLM asks a server's engine for its tasks, once at start and again for each request; there the workers are
asked whether they steer, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from expert_registry.errors import RequestError, SteerMoEError, UnsupportedFeatureError
from vllm_steermoe_plugin.admission.request_admission import AdmittedRequest, FrontEnd
from vllm_steermoe_plugin.compat.handshake import METHOD, WorkerStatus, corrects, why_not_all
from vllm_steermoe_plugin.compat.internal import wrap_once
from vllm_steermoe_plugin.compat.symbols.frontend import (
    ASYNC_CALL_ALL,
    ASYNC_LLM,
    ASYNC_LLM_TASKS,
    ENGINE_CALL,
    ENGINE_REQUEST,
    INPUT_PROCESSOR,
    INPUT_PROCESSOR_INIT,
    LLM_ENGINE,
    LLM_ENGINE_INIT,
    OFFLINE_BEAMS,
    PROCESS_INPUTS,
    SAMPLING_PARAMS,
    SERVER_ERROR,
    VALIDATION_ERROR,
)
from vllm_steermoe_plugin.frontend.attached import attach_front_end, front_end_of, refusal
from vllm_steermoe_plugin.frontend.decided import decision_of
from vllm_steermoe_plugin.frontend.http_checks import install_http_checks
from vllm_steermoe_plugin.steering.wire import compose_salt

_HTTP_CHECKED = "steermoe_http_checked"


def install_front_end_hooks() -> None:
    """Wrap the places below, once per process."""
    # What the hooks call and read, so that it is missed now and not with a request.
    for internal in (
        INPUT_PROCESSOR,
        SAMPLING_PARAMS,
        ENGINE_REQUEST,
        LLM_ENGINE,
        ASYNC_LLM,
        VALIDATION_ERROR,
        SERVER_ERROR,
        ASYNC_CALL_ALL,
        ENGINE_CALL,
    ):
        internal.load()
    wrap_once(INPUT_PROCESSOR_INIT, _processor_init)
    wrap_once(PROCESS_INPUTS, _process_inputs)
    wrap_once(LLM_ENGINE_INIT, _engine_init)
    wrap_once(ASYNC_LLM_TASKS, _tasks_of_server)
    # A server that only renders makes no engine; its modules are loaded by now.
    install_http_checks()


def _processor_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # Before the engine's other processes start, so that what cannot be applied stops the engine at once.
        attach_front_end(self)

    return init


def _engine_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        OFFLINE_BEAMS.load()
        original(self, *args, **kwargs)
        front_end = front_end_of(self.input_processor)
        # Only vLLM's synchronous engine lives in the user's own process; all else is treated as a server.
        front_end.served = False
        if front_end.awaits_workers:
            _take_note(front_end, [self.collective_rpc(METHOD)])

    return init


def _take_note(front_end: FrontEnd, answers: Sequence[Sequence[WorkerStatus]]) -> None:
    """Of what the workers of all engines have answered to the handshake."""
    front_end.set_worker_status(why_not_all(answers), corrects=corrects(answers))


def _tasks_of_server(original: Callable[..., Any]) -> Callable[..., Any]:
    async def get_supported_tasks(self: Any) -> Any:
        tasks = await original(self)
        front_end = front_end_of(self.input_processor)
        if front_end.awaits_workers:
            # To all engines: of several, `AsyncLLM.collective_rpc` gives the first one's answer only.
            answers = await self.engine_core.call_utility_all_async("collective_rpc", METHOD, None, (), None)
            _take_note(front_end, answers)
        if not hasattr(self, _HTTP_CHECKED):
            # vLLM awaits the tasks before it builds a server's app, and again for each request.
            install_http_checks(load=True)
            setattr(self, _HTTP_CHECKED, True)
        return tasks

    return get_supported_tasks


def _process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        front_end = front_end_of(self)
        try:
            admitted = _admit(front_end, params, resumable=bool(kwargs.get("resumable")))
            request = original(self, request_id, prompt, params, *args, **kwargs)
            if admitted is not None:
                front_end.check_counted(admitted, request.prompt_token_ids, params.n)
                request.sampling_params.extra_args = admitted.extra_args
            salt = admitted.salt_for(len(request.prompt_token_ids or ())) if admitted is not None else None
            request.cache_salt = compose_salt(salt, request.cache_salt)
        except SteerMoEError as error:
            raise refusal(front_end, error) from error
        return request

    return process_inputs


def _admit(front_end: FrontEnd, params: Any, *, resumable: bool) -> AdmittedRequest | None:
    """What a request's parameters ask for, checked.

    Raises:
        SteerMoEError: it cannot be applied exactly, or is not allowed.
    """
    # Pooling parameters have no extra_args; a default that steers generation does not concern them.
    if not hasattr(params, "extra_args"):
        return None
    admitted = front_end.admit(params.extra_args, decision_of(front_end))
    if admitted is None:
        return None
    if resumable and (admitted.salt or admitted.counted):
        # vLLM keeps the salt of the first piece and takes the steering of each: cached blocks would be wrong for
        # whoever finds them if the two differ, as after a profile was replaced.
        raise UnsupportedFeatureError("streaming input cannot be steered or counted; send the prompt as a whole")
    one_token = params.skip_clone and params.max_tokens == 1 and params.num_logprobs
    if admitted.by_phase and not front_end.served and one_token:
        raise RequestError(
            "vLLM's beam search asks for one token at a time, with what it has so far as the prompt, so steering of "
            "one phase would reach other tokens; generate without beam search"
        )
    return admitted
