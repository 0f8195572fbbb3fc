"""Put the front end in vLLM's way: every request of every entry point passes `process_inputs`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expert_registry import Registry
from expert_registry.errors import EngineError, SteerMoEError
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin import vllm_internals as vllm
from vllm_steermoe_plugin.architectures import shape_of
from vllm_steermoe_plugin.checkpoints import names_of
from vllm_steermoe_plugin.front_end import FrontEnd, compose_salt
from vllm_steermoe_plugin.settings import read_settings
from vllm_steermoe_plugin.state import STEER_KEY

_FRONT_END = "steermoe_front_end"


def install_front_end_hooks() -> None:
    """Wrap the three places, once per process."""
    vllm.PROCESS_INPUTS.load()
    vllm.wrap_once(vllm.INPUT_PROCESSOR, "__init__", _processor_init)
    vllm.wrap_once(vllm.INPUT_PROCESSOR, "process_inputs", _process_inputs)
    vllm.wrap_once(vllm.LLM_ENGINE, "__init__", _engine_init)


def front_end_of(processor: Any) -> FrontEnd:
    """The front end that was made with an InputProcessor."""
    found: FrontEnd = getattr(processor, _FRONT_END)
    return found


def _make_front_end(vllm_config: Any) -> FrontEnd:
    model = vllm_config.model_config
    names = model.served_model_name
    settings = read_settings(vllm_config.additional_config)
    return FrontEnd(
        settings=settings,
        shape=_shape(model),
        models=names_of(model.model, [names] if isinstance(names, str) else list(names or ())),
        registry=Registry.default(Path(settings.lock) if settings.lock else None),
        served=True,
    )


def _shape(model_config: Any) -> MoEShape | EngineError:
    try:
        return shape_of(model_config.hf_config, model_config.architecture)
    except SteerMoEError as error:
        return EngineError(str(error))


def _processor_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # At start, so that settings that cannot be applied stop the engine and not its requests.
        setattr(self, _FRONT_END, _make_front_end(self.vllm_config))
        install_beam_search_hooks()

    return init


def _engine_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # Only vLLM's synchronous engine lives in the user's own process; all else is treated as a server.
        front_end_of(self.input_processor).served = False

    return init


def install_beam_search_hooks() -> None:
    """Refuse steering in beam-search requests of servers: vLLM drops their extra arguments on the way."""
    for protocol in (vllm.CHAT_REQUEST, vllm.COMPLETION_REQUEST):
        if protocol.module in sys.modules:
            vllm.wrap_once(protocol, "to_beam_search_params", _to_beam_search_params)


def _to_beam_search_params(original: Callable[..., Any]) -> Callable[..., Any]:
    validation_error = vllm.VALIDATION_ERROR.load()

    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        if STEER_KEY in (self.vllm_xargs or {}):
            raise validation_error(
                "steermoe: vLLM's beam search does not carry a request's steering; ask without beam search",
                parameter=STEER_KEY,
            )
        return original(self, *args, **kwargs)

    return to_beam_search_params


def _process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    validation_error = vllm.VALIDATION_ERROR.load()

    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            front_end = front_end_of(self)
            # Pooling parameters have no extra_args; a default that steers generation does not concern them.
            extra_args = getattr(params, "extra_args", None)
            prepared = front_end.prepare(extra_args) if hasattr(params, "extra_args") else None
            request = original(self, request_id, prompt, params, *args, **kwargs)
            if prepared is not None:
                front_end.check_length(prepared, request.prompt_token_ids)
                request.sampling_params.extra_args = prepared.extra_args
            salt = prepared.salt_for(len(request.prompt_token_ids or ())) if prepared is not None else None
            request.cache_salt = compose_salt(salt, request.cache_salt)
        except SteerMoEError as error:
            raise validation_error(f"steermoe: {error}", parameter=STEER_KEY) from error
        return request

    return process_inputs
