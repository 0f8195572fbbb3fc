"""The front end: check a request, resolve its steering, and say how the worker and the prefix cache see it.

It knows no vLLM. `engine_hooks.py` puts it in vLLM's way.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from expert_registry import Registry
from expert_registry.errors import EngineError, PolicyError, RequestError
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.counting import CountedSpans
from vllm_steermoe_plugin.request import SteeringRequest, parse_request
from vllm_steermoe_plugin.resolve import Resolved, resolve
from vllm_steermoe_plugin.settings import Settings, check_policy
from vllm_steermoe_plugin.state import COUNT_KEY, STEER_KEY

SALT_PREFIX = "steermoe:"


@dataclass(frozen=True, slots=True)
class Prepared:
    """How a request goes on.

    Attributes:
        extra_args: for the worker; steering stands in it as canonical JSON.
        salt: what must go into the prefix cache's key, or None for a request that vLLM
            computes as without the plugin.
        by_phase: whether prompt and generated tokens are steered differently.
    """

    extra_args: dict[str, object]
    salt: str | None
    by_phase: bool = False

    def salt_for(self, prompt_tokens: int) -> str | None:
        """The salt, given the prompt's length.

        Steered by phase, a cached token depends on where its request's prompt ended: what one request
        generated would else be found as another's prompt.
        """
        return f"{self.salt}@{prompt_tokens}" if self.by_phase else self.salt


class FrontEnd:
    """Checks requests for one engine.

    Attributes:
        served: whether requests come to a server rather than from this process.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        shape: MoEShape | EngineError,
        models: Sequence[str],
        registry: Registry,
        served: bool,
    ) -> None:
        """Make a front end.

        Args:
            settings: the operator's.
            shape: of the served model, or why it cannot be steered.
            models: its names, for the registry.
            registry: where rankings are.
            served: see above.

        Raises:
            SteerMoEError: the default steering of the settings cannot be applied to this model.
        """
        self.served = served
        self._settings = settings
        self._shape = shape
        self._models = tuple(models)
        self._registry = registry
        # By the parsed request, so that callers cannot fill it with spellings of the same. Errors are not
        # remembered; a ranking that is published while serving is seen by requests that pin its version.
        self._remembered = lru_cache(maxsize=1024)(self._resolve)
        if settings.enabled and settings.default is not None:
            self.resolve(settings.default)

    def resolve(self, text: str) -> Resolved | None:
        """The profile that a text asks for, policy aside; None for `none`."""
        return self._remembered(parse_request(text))

    def _resolve(self, request: SteeringRequest) -> Resolved | None:
        if request and isinstance(self._shape, EngineError):
            # A new one each time: raising the same object again would lengthen its traceback for ever.
            raise EngineError(str(self._shape))
        return (
            None
            if isinstance(self._shape, EngineError)
            else resolve(request, self._models, self._shape, self._registry, self._settings.base_model)
        )

    def prepare(self, extra_args: Mapping[str, object] | None) -> Prepared | None:
        """Check what a request asks for; None if it asks for nothing and there is no default.

        Raises:
            SteerMoEError: it cannot be applied exactly, or is not allowed.
        """
        args = dict(extra_args or {})
        named = STEER_KEY in args or COUNT_KEY in args
        steer, count = args.pop(STEER_KEY, None), args.pop(COUNT_KEY, None)
        resolved = self._steering(steer)
        if not named and resolved is None:
            return None
        salts = []
        if resolved is not None:
            args[STEER_KEY] = resolved.profile.to_json()
            salts.append(resolved.profile.digest)
        if count is not None:
            args[COUNT_KEY] = self._counted(count).to_json()
            # A token found in the prefix cache is not routed again, so it would not be counted.
            salts.append(f"count-{uuid.uuid4().hex}")
        by_phase = resolved is not None and resolved.profile.phase != "both"
        return Prepared(args, SALT_PREFIX + "+".join(salts) if salts else None, by_phase)

    def _steering(self, asked: object) -> Resolved | None:
        """What a request is steered by: what it asks for if that is allowed, else the default."""
        if asked is not None:
            request = parse_request(asked)
            check_policy(request, self._settings, served=self.served)
            return self._remembered(request)
        if self._settings.enabled and self._settings.default is not None:
            return self.resolve(self._settings.default)
        return None

    def _counted(self, text: object) -> CountedSpans:
        if self.served:
            raise PolicyError("routing is counted in process only, not over HTTP; use `steermoe detect`")
        if not self._settings.enabled or self._settings.count_groups == 0:
            raise EngineError("this engine does not count; start it with the setting 'count_groups' above 0")
        spans = CountedSpans.from_json(text)
        if spans.last_group > self._settings.count_groups:
            raise RequestError(f"group {spans.last_group} of {self._settings.count_groups}")
        return spans

    @staticmethod
    def check_length(prepared: Prepared, prompt_token_ids: Sequence[int] | None) -> None:
        """Raise RequestError if tokens are to be counted that are not in the prompt."""
        counted = prepared.extra_args.get(COUNT_KEY)
        if counted is not None:
            stop = CountedSpans.from_json(counted).ranges[-1][1]
            if stop > len(prompt_token_ids or ()):
                raise RequestError(
                    f"counted positions end at {stop}, after the prompt's {len(prompt_token_ids or ())} tokens"
                )


def compose_salt(salt: str | None, user_salt: str | None) -> str | None:
    """The request's cache salt: ours, joined with the user's own.

    Raises:
        RequestError: the user's salt looks like ours; it could reach another request's cached blocks.
    """
    if user_salt is not None and user_salt.startswith(SALT_PREFIX):
        raise RequestError(f"a cache salt must not begin with {SALT_PREFIX!r}; that is reserved for steering")
    if salt is None:
        return user_salt
    return salt if user_salt is None else f"{salt}:{user_salt}"
