"""Put the front end in vLLM's way: every request of every entry point passes `process_inputs`.

Before that vLLM asks the engine for its tasks, once at start and again for each request. There the workers are asked
whether they steer, once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from expert_registry import Registry
from expert_registry.errors import EngineError, RequestError, SteerMoEError
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.admission.request_admission import OPERATORS_ERRORS, FrontEnd
from vllm_steermoe_plugin.compat.internal import wrap_once
from vllm_steermoe_plugin.compat.plugin_allowlist import check_routes_allowed
from vllm_steermoe_plugin.compat.symbols.config import PARALLEL_CONFIG
from vllm_steermoe_plugin.compat.symbols.frontend import (
    ASYNC_ADD_REQUEST,
    ASYNC_CALL_ALL,
    ASYNC_LLM,
    ASYNC_LLM_INIT,
    ASYNC_LLM_TASKS,
    BEAM_SEARCH_OFFLINE,
    BEAM_SEARCH_ONLINE,
    ENGINE_CALL,
    ENGINE_REQUEST,
    INPUT_PROCESSOR,
    INPUT_PROCESSOR_INIT,
    LLM_ENGINE,
    LLM_ENGINE_ADD,
    LLM_ENGINE_INIT,
    LLM_ENGINE_TASKS,
    OFFLINE,
    ONLINE,
    PROCESS_INPUTS,
    SAMPLING_PARAMS,
    SERVER_ERROR,
    VALIDATION_ERROR,
)
from vllm_steermoe_plugin.frontend.http_checks import install_http_hooks
from vllm_steermoe_plugin.frontend.management.operator_key import read_key
from vllm_steermoe_plugin.models.checkpoints import names_of
from vllm_steermoe_plugin.models.steerability import served_shape
from vllm_steermoe_plugin.settings import Settings, read_settings
from vllm_steermoe_plugin.steering.wire import STEER_KEY, compose_salt
from vllm_steermoe_plugin.worker.handshake import CALL, why_not_all

_FRONT_END = "steermoe_front_end"


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
    wrap_once(ASYNC_LLM_INIT, _server_init)
    wrap_once(LLM_ENGINE_TASKS, _tasks)
    wrap_once(ASYNC_LLM_TASKS, _tasks_of_server)
    wrap_once(LLM_ENGINE_ADD, _add_engine_request)
    wrap_once(ASYNC_ADD_REQUEST, _add_request)
    # A server that only renders makes no engine; its modules are loaded by now.
    install_http_hooks(_check)


def front_end_of(processor: Any) -> FrontEnd:
    """The front end that was made with an InputProcessor."""
    found: FrontEnd = getattr(processor, _FRONT_END)
    return found


def _make_front_end(vllm_config: Any) -> FrontEnd:
    model = vllm_config.model_config
    names = model.served_model_name
    settings = read_settings(vllm_config.additional_config)
    if settings.manage is not None:
        _check_manageable(settings, vllm_config.parallel_config)
    return FrontEnd(
        settings=settings,
        shape=_shape(vllm_config),
        models=names_of(model.model, [names] if isinstance(names, str) else list(names or ())),
        registry=Registry.default(Path(settings.lock) if settings.lock else None),
        served=True,
        awaits_workers=True,
    )


def _check_manageable(settings: Settings, parallel: Any) -> None:
    """Raise EngineError if profiles could not be managed as the settings say."""
    assert settings.manage is not None
    read_key(settings.manage)
    check_routes_allowed()
    PARALLEL_CONFIG.load()
    if settings.profile_store is None and (parallel._api_process_count > 1 or parallel.data_parallel_size > 1):
        raise EngineError(
            "setting 'manage' with several front-end processes (--api-server-count, --data-parallel-size): a profile "
            "loaded into one would be unknown to the others; set 'profile_store' to a file that they share"
        )


def _shape(vllm_config: Any) -> MoEShape | EngineError:
    try:
        return served_shape(vllm_config)
    except SteerMoEError as error:
        return EngineError(str(error))


def _processor_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # At start, so that settings that cannot be applied stop the engine and not its requests.
        setattr(self, _FRONT_END, _make_front_end(self.vllm_config))
        install_beam_search_hooks()
        install_http_hooks(_check)

    return init


def _engine_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # Only vLLM's synchronous engine lives in the user's own process; all else is treated as a server.
        front_end_of(self.input_processor).served = False

    return init


def _server_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        install_http_hooks(_check, load=True)

    return init


async def _check(engine_client: Any, extra_args: Mapping[str, object] | None) -> None:
    """Raise what vLLM answers if a request that generates, to a server with this engine, is refused."""
    if engine_client is None:
        return  # What this server renders is checked where it is generated from.
    front_end = front_end_of(engine_client.input_processor)
    if front_end.awaits_workers:
        return  # vLLM asks for the tasks first.
    try:
        if STEER_KEY in (extra_args or {}) or front_end.wants_store(extra_args):
            # Files may be read; requests of others must not wait for that.
            await asyncio.to_thread(front_end.prepare, extra_args)
        else:
            front_end.prepare(extra_args)
    except SteerMoEError as error:
        raise _answer(front_end, error) from None


def _tasks(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_supported_tasks(self: Any) -> Any:
        tasks = original(self)
        front_end = front_end_of(self.input_processor)
        if front_end.awaits_workers:
            front_end.set_worker_status(why_not_all([self.collective_rpc(CALL)]))
        return tasks

    return get_supported_tasks


def _tasks_of_server(original: Callable[..., Any]) -> Callable[..., Any]:
    async def get_supported_tasks(self: Any) -> Any:
        tasks = await original(self)
        front_end = front_end_of(self.input_processor)
        if front_end.awaits_workers:
            # To all engines: of several, `AsyncLLM.collective_rpc` gives the first one's answer only.
            answers = await self.engine_core.call_utility_all_async("collective_rpc", CALL, None, (), None)
            front_end.set_worker_status(why_not_all(answers))
        return tasks

    return get_supported_tasks


def _add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    async def add_request(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        front_end = front_end_of(self.input_processor)
        _check_made(front_end, prompt)
        if front_end.wants_store(getattr(params, "extra_args", None)):
            # `process_inputs`, on the event loop, then finds it read.
            await asyncio.to_thread(front_end.read_store)
        return await original(self, request_id, prompt, params, *args, **kwargs)

    return add_request


def _add_engine_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_request(self: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        _check_made(front_end_of(self.input_processor), prompt)
        return original(self, request_id, prompt, *args, **kwargs)

    return add_request


def _check_made(front_end: FrontEnd, prompt: Any) -> None:
    """Raise what vLLM answers if `prompt` is a request that was made elsewhere and cannot go on as it is."""
    if not isinstance(prompt, ENGINE_REQUEST.load()) or prompt.sampling_params is None:
        return
    try:
        front_end.check_made(prompt.sampling_params.extra_args)
    except SteerMoEError as error:
        raise _answer(front_end, error) from error


def install_beam_search_hooks() -> None:
    """Refuse in beam search what it would misapply (what it would drop: `frontend/http_checks.py`).

    It asks for one token at a time, with what it has so far as the prompt, so that a default by phase would take
    generated tokens for the prompt's.
    """
    OFFLINE.load()
    ONLINE.load()
    wrap_once(BEAM_SEARCH_OFFLINE, _beam_search(lambda llm: llm.llm_engine))
    wrap_once(BEAM_SEARCH_ONLINE, _beam_search(lambda serving: serving.engine_client))


def _beam_search(engine_of: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
            front_end = front_end_of(engine_of(self).input_processor)
            try:
                by_default = front_end.prepare(None)
                if by_default is not None and by_default.by_phase:
                    raise RequestError(
                        "this engine steers every request in one phase only by default, which vLLM's beam search would "
                        "apply to other tokens; ask without beam search"
                    )
            except SteerMoEError as error:
                raise _answer(front_end, error) from error
            return original(self, *args, **kwargs)

        return beam_search

    return make


def _process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        front_end = front_end_of(self)
        try:
            # Pooling parameters have no extra_args; a default that steers generation does not concern them.
            extra_args = getattr(params, "extra_args", None)
            prepared = front_end.prepare(extra_args) if hasattr(params, "extra_args") else None
            if kwargs.get("resumable") and prepared is not None and (prepared.salt or prepared.counted):
                # vLLM keeps the salt of the first piece and takes the steering of each: cached blocks would be wrong
                # for whoever finds them if the two differ, as after a profile was replaced.
                raise EngineError("a request whose input comes in pieces cannot be steered or counted; send it whole")
            request = original(self, request_id, prompt, params, *args, **kwargs)
            if prepared is not None:
                front_end.check_counted(prepared, request.prompt_token_ids, params.n)
                request.sampling_params.extra_args = prepared.extra_args
            salt = prepared.salt_for(len(request.prompt_token_ids or ())) if prepared is not None else None
            request.cache_salt = compose_salt(salt, request.cache_salt)
        except SteerMoEError as error:
            raise _answer(front_end, error) from error
        return request

    return process_inputs


def _answer(front_end: FrontEnd, error: SteerMoEError) -> Exception:
    """What vLLM answers to a caller."""
    text = f"steermoe: {front_end.describe(error)}"
    refusal: Exception
    if isinstance(error, OPERATORS_ERRORS):
        refusal = SERVER_ERROR.load()(text, HTTPStatus.INTERNAL_SERVER_ERROR)
    else:
        refusal = VALIDATION_ERROR.load()(text, parameter=STEER_KEY)
    return refusal
