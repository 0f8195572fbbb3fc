"""EngineCore-side check that steered requests were admitted by the plugin.

A front end without the plugin, before workers with it, would pass on what a caller wrote: an expert list without
policy, cache salt or default, or a name that no worker can read; and nothing where there is a default. Here it ends
that request alone, as an error; in a step it would end the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from expert_registry.errors import RequestError, SteerMoEError
from vllm_steermoe_plugin.compat.internal import wrap_once
from vllm_steermoe_plugin.compat.symbols.core import CORE, CORE_PREPROCESS, CORE_REQUEST, SCHEDULER
from vllm_steermoe_plugin.compat.symbols.frontend import VALIDATION_ERROR
from vllm_steermoe_plugin.core.block_keys import keep_apart
from vllm_steermoe_plugin.models.steerability import served_shape
from vllm_steermoe_plugin.settings import read_settings
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans
from vllm_steermoe_plugin.steering.profile import SteeringProfile
from vllm_steermoe_plugin.steering.request import parse_request
from vllm_steermoe_plugin.steering.rules import check_rules
from vllm_steermoe_plugin.steering.wire import (
    COUNT_KEY,
    SALT_PREFIX,
    STEER_KEY,
    is_unchecked,
    refusal_text,
    was_checked,
)

_DEFAULT = "steermoe_default"
_CHECK = "steermoe_check"


def install_core_check() -> None:
    """Wrap the place where the core takes requests, once per process."""
    for internal in (CORE, CORE_REQUEST, SCHEDULER, VALIDATION_ERROR):
        internal.load()
    wrap_once(CORE_PREPROCESS, _preprocess)


def _preprocess(original: Callable[..., Any]) -> Callable[..., Any]:
    def preprocess_add_request(self: Any, request: Any) -> Any:
        # First what it does for its caches, on which the front end counts.
        taken = original(self, request)
        # One that is aborted before it runs, to free what was sent ahead of it, is made without a front end.
        if request.sampling_params is not None and not request.abort_immediately:
            try:
                _check(self, request)
                keep_apart(taken[0], request.sampling_params.extra_args, self.scheduler)
            except SteerMoEError as error:
                raise VALIDATION_ERROR.load()(refusal_text(error, error.code), parameter=STEER_KEY) from error
        return taken

    return preprocess_add_request


def _check(core: Any, request: Any) -> None:
    """Raise SteerMoEError if a request was not checked, or a worker could not do what it says.

    A caller of a front end without the plugin may have written the mark, too.
    """
    extra_args = request.sampling_params.extra_args
    if not was_checked(extra_args):
        if is_unchecked(extra_args) or _has_default(core):
            raise RequestError(
                f"request {request.request_id} would be steered or counted and was not checked: the process that "
                "sent it does not load the plugin (in the same version), or has other settings, or passed an "
                "EngineCoreRequest; install the plugin there, mind VLLM_PLUGINS, give all the same additional_config, "
                "and pass a prompt and SamplingParams"
            )
        return
    text, count = extra_args.get(STEER_KEY), extra_args.get(COUNT_KEY)
    if count is not None:
        CountedSpans.from_json(count)
    if text is None:
        return
    if not (request.cache_salt or "").startswith(SALT_PREFIX):
        raise RequestError(f"request {request.request_id} is steered and has no salt of steering")
    check: Callable[[str], None] | None = getattr(core, _CHECK, None)
    if check is None:
        shape = served_shape(core.vllm_config)

        def fits(text: str) -> None:
            check_rules(SteeringProfile.from_json(text), shape)

        check = lru_cache(maxsize=256)(fits)
        setattr(core, _CHECK, check)
    check(text)


def _has_default(core: Any) -> bool:
    """Whether the operator of a core's engine has all requests steered. Looked up once for each core."""
    found: bool | None = getattr(core, _DEFAULT, None)
    if found is None:
        settings = read_settings(core.vllm_config.additional_config)
        found = settings.enabled and settings.default is not None and bool(parse_request(settings.default))
        setattr(core, _DEFAULT, found)
    return found
