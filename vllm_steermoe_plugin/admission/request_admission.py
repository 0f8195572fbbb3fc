"""The front end: checks a request, resolves its steering expression, and derives worker arguments and cache salt.

Independent of vLLM; `frontend/hooks.py` installs it.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from expert_registry import Registry
from expert_registry.errors import (
    ConfigurationError,
    EngineError,
    FileError,
    PolicyError,
    RankingFormatError,
    RequestError,
    SteerMoEError,
)
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.admission.policy import check_policy
from vllm_steermoe_plugin.admission.profiles.file import StoreError
from vllm_steermoe_plugin.admission.resolver import Resolver
from vllm_steermoe_plugin.settings import Settings
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans
from vllm_steermoe_plugin.steering.profile import SteeringProfile
from vllm_steermoe_plugin.steering.request import SteeringRequest, lists_experts, parse_request
from vllm_steermoe_plugin.steering.resolve import Resolved
from vllm_steermoe_plugin.steering.wire import (
    CHECKED_KEY,
    COUNT_KEY,
    SHARED_KEY,
    STEER_KEY,
    STEERED,
)

_SOME_EXPERTS = SteeringRequest(explicit=SteeringProfile(activate=frozenset({(0, 0)})))


class DefaultError(EngineError):
    """The operator's default steering cannot be applied any more."""

    code = "STEERMOE-E305"


OPERATORS_ERRORS = (DefaultError, StoreError, RankingFormatError, FileError)
"""Errors for which whoever asks is not at fault."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided on a request's steering: `spec` as it stands there (None: nothing), `resolved` what it means."""

    spec: object
    resolved: Resolved | None


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """How a request goes on.

    Attributes:
        extra_args: for the engine's core and the worker; steering stands in it as canonical JSON.
        salt: what must go into the prefix cache's key, or None for a request that vLLM
            computes as without the plugin.
        by_phase: whether prompt and generated tokens are steered differently.
        counted: the prompt's positions that are counted, if any.
        decision: on its steering.
    """

    extra_args: dict[str, object]
    salt: str | None
    by_phase: bool = False
    counted: CountedSpans | None = None
    decision: Decision | None = field(default=None, compare=False)

    def salt_for(self, prompt_tokens: int) -> str | None:
        """The salt, given the prompt's length.

        Steered by phase, a cached token depends on where its request's prompt ended: what one request
        generated would else be found as another's prompt.
        """
        return f"{self.salt}:{prompt_tokens}" if self.by_phase else self.salt


class FrontEnd:
    """Checks requests for one engine.

    Attributes:
        served: whether requests come to a server rather than from this process.
        resolver: resolves steering expressions for this engine.
        awaits_workers: whether no request may be steered until `set_worker_status`.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        shape: MoEShape | EngineError,
        models: Sequence[str],
        registry: Registry,
        served: bool,
        awaits_workers: bool = False,
    ) -> None:
        """Make a front end.

        Args:
            settings: the operator's.
            shape: of the served model, or why it cannot be steered.
            models: its names, for the registry.
            registry: where rankings are.
            served: see above.
            awaits_workers: see above; without effect on a model that is not steered.

        Raises:
            SteerMoEError: the default steering or a profile of the settings cannot be applied to this model.
        """
        self.served = served
        self.awaits_workers = awaits_workers and settings.enabled and isinstance(shape, MoEShape)
        self._settings = settings
        self.resolver = Resolver(settings=settings, shape=shape, models=models, registry=registry)

    def resolve(self, text: str) -> Resolved | None:
        """The profile of a steering expression, policy aside; None for `none`."""
        return self.resolver.resolve(parse_request(text))

    def set_worker_status(self, absent: str | None, *, corrects: bool = False) -> None:
        """Record the result of the worker handshake.

        Args:
            absent: why steering would not reach all workers; steered requests are then refused. None if it would.
            corrects: whether they correct selections in some layer, rather than rewrite logits in all.

        Raises:
            EngineError: it would not, and there is a default.
            ProfileError: the default asks for what these routers cannot do.
        """
        if absent is not None:
            self.resolver.refuse(absent)
        self.resolver.corrects = corrects
        self.resolver.resolve_default()
        self.awaits_workers = False

    def wants_store(self, extra_args: Mapping[str, object] | None) -> bool:
        """Whether `admit` would have to read a profile store that has changed."""
        store = self.resolver.store
        return store is not None and store.has_changed() and self._may_read(dict(extra_args or {}).get(STEER_KEY))

    def _may_read(self, spec: object) -> bool:
        if lists_experts(spec):
            return False
        try:
            return self.resolver.reads_store(None if spec is None else parse_request(spec))
        except SteerMoEError:
            return False

    def describe(self, error: SteerMoEError) -> str:
        """The message for whoever sent the request: a server leaves out where the operator's files are."""
        return error.public if self.served else str(error)

    def admit(self, extra_args: Mapping[str, object] | None, decided: Decision | None = None) -> AdmittedRequest | None:
        """Check what a request asks for; None if it asks for nothing and there is no default.

        Args:
            extra_args: of its sampling parameters.
            decided: what has been decided on it before; ignored unless it asks for the same.

        Raises:
            SteerMoEError: it cannot be applied exactly, or is not allowed.
        """
        args = dict(extra_args or {})
        for key in (SHARED_KEY, CHECKED_KEY):
            if key in args:
                raise RequestError(f"{key!r} is written by the plugin itself; leave it out")
        named = STEER_KEY in args or COUNT_KEY in args
        steer, count = args.pop(STEER_KEY, None), args.pop(COUNT_KEY, None)
        resolved = decided.resolved if decided is not None and decided.spec == steer else self._steering(steer)
        if resolved is not None and self.awaits_workers:
            raise EngineError("the worker handshake of this engine is not complete")
        if not named and resolved is None:
            return None
        counted = None
        args[CHECKED_KEY] = True
        if resolved is not None:
            args[STEER_KEY] = resolved.text
        if count is not None:
            counted = self._counted(count)
            args |= {COUNT_KEY: count, SHARED_KEY: [counted.ranges[0][0], uuid.uuid4().hex]}
        by_phase = resolved is not None and resolved.profile.phase != "both"
        salt = STEERED + resolved.digest if resolved is not None else None
        return AdmittedRequest(args, salt, by_phase, counted, Decision(steer, resolved))

    def _steering(self, spec: object) -> Resolved | None:
        """What a request is steered by: what it asks for if that is allowed, else the default."""
        if spec is not None:
            if lists_experts(spec):
                # Policy first: reading a large list takes a while, and it asks for the same whatever it says.
                check_policy(_SOME_EXPERTS, self._settings, served=self.served)
                return self.resolver.resolve_experts(spec)
            request = parse_request(spec)
            check_policy(request, self._settings, served=self.served)
            return self.resolver.resolve(request)
        try:
            return self.resolver.resolve_default()
        except SteerMoEError as error:
            why = f"the default steering of this server cannot be applied: {error}"
            raise DefaultError(why, paths=error.paths) from error

    def _counted(self, text: object) -> CountedSpans:
        if self.served:
            raise PolicyError("routing is counted in process only, not over HTTP; use `steermoe detect`")
        if not self._settings.enabled or self._settings.count_groups == 0:
            raise ConfigurationError("this engine does not count; start it with the setting 'count_groups' above 0")
        spans = CountedSpans.from_json(text)
        if spans.last_group > self._settings.count_groups:
            raise RequestError(f"group {spans.last_group} of {self._settings.count_groups}")
        return spans

    @staticmethod
    def check_counted(admitted: AdmittedRequest, prompt_token_ids: Sequence[int] | None, samples: int) -> None:
        """Check that what is to be counted is there, and once.

        Args:
            admitted: of the request.
            prompt_token_ids: of its prompt.
            samples: how many answers it asks for (`n` of vLLM's SamplingParams).

        Raises:
            RequestError: positions beyond the prompt are to be counted; or several answers are asked for, which
                vLLM makes requests of with the same prompt and the same mark, that find some of each other's tokens.
        """
        if admitted.counted is None:
            return
        if samples != 1:
            raise RequestError(
                f"n={samples} answers are asked for and the prompt's routing is to be counted, which would be neither "
                f"once nor {samples} times; count with n=1"
            )
        stop = admitted.counted.ranges[-1][1]
        if stop > len(prompt_token_ids or ()):
            raise RequestError(
                f"counted positions end at {stop}, after the prompt's {len(prompt_token_ids or ())} tokens"
            )
