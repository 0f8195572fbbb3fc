"""Put the front end in vLLM's way: every request of every entry point passes `process_inputs`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from expert_registry import Registry
from expert_registry.errors import EngineError, SteerMoEError
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin import vllm_internals as vllm
from vllm_steermoe_plugin.architectures import ARCHITECTURES, shape_of
from vllm_steermoe_plugin.checkpoints import names_of
from vllm_steermoe_plugin.front_end import FrontEnd, compose_salt
from vllm_steermoe_plugin.settings import read_settings
from vllm_steermoe_plugin.state import STEER_KEY

_FRONT_END = "steermoe_front_end"
_IN_PROCESS = "steermoe_in_process"


def install_front_end_hooks() -> None:
    """Wrap the two places, once per process."""
    vllm.PROCESS_INPUTS.load()
    vllm.wrap_once(vllm.INPUT_PROCESSOR, "process_inputs", _process_inputs)
    vllm.wrap_once(vllm.LLM_ENGINE, "__init__", _engine_init)


def front_end_of(processor: Any) -> FrontEnd:
    """The front end of an InputProcessor, made on first use."""
    if not hasattr(processor, _FRONT_END):
        config = processor.vllm_config
        model = config.model_config
        served_names = model.served_model_name
        aliases = [served_names] if isinstance(served_names, str) else list(served_names or ())
        front_end = FrontEnd(
            settings=read_settings(config.additional_config),
            shape=_shape(model),
            models=names_of(model.model, aliases),
            registry=Registry.default(),
            # Only vLLM's synchronous engine lives in the user's own process; all else is treated as a server.
            served=not getattr(processor, _IN_PROCESS, False),
        )
        setattr(processor, _FRONT_END, front_end)
    found: FrontEnd = getattr(processor, _FRONT_END)
    return found


def _shape(model_config: Any) -> MoEShape | EngineError:
    if model_config.architecture not in ARCHITECTURES:
        return EngineError(
            f"vLLM runs this model as {model_config.architecture}, which cannot be steered; "
            f"steerable: {', '.join(sorted(ARCHITECTURES))}"
        )
    try:
        return shape_of(model_config.hf_text_config)
    except SteerMoEError as error:
        return EngineError(str(error))


def _engine_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        setattr(self.input_processor, _IN_PROCESS, True)

    return init


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
            request.cache_salt = compose_salt(prepared.salt if prepared else None, request.cache_salt)
        except SteerMoEError as error:
            raise validation_error(f"steermoe: {error}", parameter=STEER_KEY) from error
        return request

    return process_inputs
