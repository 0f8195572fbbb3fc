"""The front end that belongs to an engine, and how its refusals reach vLLM's callers."""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path
from typing import Any

from expert_registry import Registry
from expert_registry.errors import ConfigurationError, EngineError, SteerMoEError
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.admission.request_admission import OPERATORS_ERRORS, FrontEnd
from vllm_steermoe_plugin.compat.handshake import EXTENSION
from vllm_steermoe_plugin.compat.ledger import check_source_build
from vllm_steermoe_plugin.compat.plugin_allowlist import check_routes_allowed
from vllm_steermoe_plugin.compat.symbols.config import PARALLEL_CONFIG
from vllm_steermoe_plugin.compat.symbols.frontend import SERVER_ERROR, VALIDATION_ERROR
from vllm_steermoe_plugin.frontend.management.operator_key import read_key
from vllm_steermoe_plugin.models.checkpoints import names_of
from vllm_steermoe_plugin.models.engine_limits import refuse_unsupported
from vllm_steermoe_plugin.models.steerability import served_shape
from vllm_steermoe_plugin.settings import Settings, read_settings
from vllm_steermoe_plugin.steering.wire import STEER_KEY, refusal_text

_FRONT_END = "steermoe_front_end"


def attach_front_end(processor: Any) -> None:
    """Make the front end of the engine for which vLLM has made an InputProcessor.

    Raises:
        SteerMoEError: the engine cannot steer as it is configured, or the settings cannot be applied.
    """
    setattr(processor, _FRONT_END, _make_front_end(processor.vllm_config))


def front_end_of(processor: Any) -> FrontEnd:
    """The front end that was made with an InputProcessor."""
    found: FrontEnd = getattr(processor, _FRONT_END)
    return found


def refusal(front_end: FrontEnd | None, error: SteerMoEError) -> Exception:
    """What vLLM answers to a caller: HTTP 400, or 500 where the operator is at fault.

    Args:
        front_end: of the engine; None if the request was refused before any was asked.
        error: why.
    """
    text = refusal_text(error if front_end is None else front_end.describe(error), error.code)
    if isinstance(error, OPERATORS_ERRORS):
        answer: Exception = SERVER_ERROR.load()(text, HTTPStatus.INTERNAL_SERVER_ERROR)
    else:
        answer = VALIDATION_ERROR.load()(text, parameter=STEER_KEY)
    return answer


def _make_front_end(vllm_config: Any) -> FrontEnd:
    check_source_build()
    PARALLEL_CONFIG.load()
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    names = model.served_model_name
    settings = read_settings(vllm_config.additional_config)
    if settings.manage is not None:
        _check_manageable(settings, parallel)
    shape = _shape(vllm_config)
    front_end = FrontEnd(
        settings=settings,
        shape=shape,
        models=names_of(model.model, [names] if isinstance(names, str) else list(names or ())),
        registry=Registry.default(Path(settings.lock) if settings.lock else None),
        served=True,
        awaits_workers=True,
    )
    if front_end.awaits_workers and isinstance(shape, MoEShape):
        # Again in each worker, which may be configured by another process.
        refuse_unsupported(vllm_config, settings)
        if not parallel.worker_extension_cls.startswith(EXTENSION):
            raise ConfigurationError(
                f"the workers are configured with {parallel.worker_extension_cls or 'no extension'}, not with "
                f"{EXTENSION}: vLLM did not ask {shape.architecture} to prepare the configuration, or it was changed "
                "afterwards. Pass your own extension as worker_extension_cls, and the plugin adds its methods"
            )
    return front_end


def _check_manageable(settings: Settings, parallel: Any) -> None:
    """Raise EngineError if profiles could not be managed as the settings say."""
    assert settings.manage is not None
    read_key(settings.manage)
    check_routes_allowed()
    if settings.profile_store is None and (parallel._api_process_count > 1 or parallel.data_parallel_size > 1):
        raise ConfigurationError(
            "setting 'manage' with several front-end processes (--api-server-count, --data-parallel-size): a profile "
            "loaded into one would be unknown to the others; set 'profile_store' to a file that they share"
        )


def _shape(vllm_config: Any) -> MoEShape | EngineError:
    try:
        return served_shape(vllm_config)
    except SteerMoEError as error:
        return EngineError(str(error))
