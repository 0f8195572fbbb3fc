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
from vllm_steermoe_plugin.request import parse_request
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
    """

    extra_args: dict[str, object]
    salt: str | None


class FrontEnd:
    """Checks requests for one engine."""

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
            served: whether requests come to a server rather than from this process.

        Raises:
            SteerMoEError: the default steering of the settings cannot be applied to this model.
        """
        self._settings = settings
        self._shape = shape
        self._models = tuple(models)
        self._registry = registry
        self._served = served
        # Rankings are immutable, so what a text resolves to may be remembered; errors are not.
        self._remembered = lru_cache(maxsize=1024)(self._resolve)
        if settings.enabled and settings.default is not None:
            self.resolve(settings.default)

    def resolve(self, text: str) -> Resolved | None:
        """The profile that a text asks for, policy aside; None for `none`."""
        return self._remembered(text)

    def _resolve(self, text: str) -> Resolved | None:
        if isinstance(self._shape, EngineError):
            raise self._shape
        return resolve(parse_request(text), self._models, self._shape, self._registry)

    def prepare(self, extra_args: Mapping[str, object] | None) -> Prepared | None:
        """Check what a request asks for; None if it asks for nothing and there is no default.

        Raises:
            SteerMoEError: it cannot be applied exactly, or is not allowed.
        """
        args = dict(extra_args or {})
        asked = args.pop(STEER_KEY, None)
        counted = args.get(COUNT_KEY)
        if asked is not None:
            check_policy(parse_request(asked), self._settings, served=self._served)
            text = str(asked)
        elif self._settings.enabled and self._settings.default is not None:
            text = self._settings.default
        elif counted is None:
            return None
        else:
            text = ""
        resolved = self.resolve(text) if text else None
        salts = []
        if resolved is not None:
            args[STEER_KEY] = resolved.profile.to_json()
            salts.append(resolved.profile.digest)
        if counted is not None:
            args[COUNT_KEY] = self._counted(counted).to_json()
            # A token found in the prefix cache is not routed again, so it would not be counted.
            salts.append(f"count-{uuid.uuid4().hex}")
        return Prepared(args, SALT_PREFIX + "+".join(salts) if salts else None)

    def _counted(self, text: object) -> CountedSpans:
        if self._served:
            raise PolicyError("routing is counted in process only, not over HTTP; use `steermoe detect`")
        if not self._settings.enabled or self._settings.count_groups == 0:
            raise EngineError("this engine does not count; start it with the setting 'count_groups' above 0")
        spans = CountedSpans.from_json(text)
        if spans.group > self._settings.count_groups:
            raise RequestError(f"group {spans.group} of {self._settings.count_groups}")
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
