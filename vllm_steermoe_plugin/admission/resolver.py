"""What a request's text means on this server, now: rankings, loaded profiles and the operator's settings together.

It knows no vLLM. Each request asks it through `request_admission.py`, and the profile manager when something changes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from expert_registry import Registry
from expert_registry.errors import (
    ConfigurationError,
    EngineError,
    PolicyError,
    ProfileError,
    RequestError,
    SteerMoEError,
)
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.admission.pinned_rankings import PinnedRankings
from vllm_steermoe_plugin.admission.profiles.loaded import Loaded, LoadedProfile
from vllm_steermoe_plugin.admission.profiles.store import ProfileStore
from vllm_steermoe_plugin.settings import Settings
from vllm_steermoe_plugin.steering.request import NONE, SteeringRequest, parse_request
from vllm_steermoe_plugin.steering.resolve import Resolved, resolve

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Used:
    """The rankings in use since the operator last had them refreshed, and how often that was."""

    refreshed: int
    rankings: PinnedRankings


class Resolver:
    """Resolves requests for one served model. Policy is not its business.

    Attributes:
        store: the loaded profiles; None if the settings ask for none and nobody may load any.
        corrects: whether the workers correct selections in some layer, rather than rewrite logits in all; None until
            they have said so.
    """

    def __init__(
        self, *, settings: Settings, shape: MoEShape | EngineError, models: Sequence[str], registry: Registry
    ) -> None:
        """Open the profile store, load the profiles of the settings and try the default.

        Raises:
            SteerMoEError: one of them cannot be applied to this model.
        """
        self._settings = settings
        self._shape = shape
        self._models = tuple(models)
        self._registry = registry
        self.corrects: bool | None = None
        self._used = _Used(0, PinnedRankings(registry))
        # By the parsed request and the profiles that it names, so that callers cannot fill it with spellings of
        # the same, and a replaced profile is another one. That rankings do not go together is remembered, since all of
        # them were read for that; that there is none is not, since one may be published any time.
        self._remembered = lru_cache(maxsize=1024)(self._resolve_or_why)
        # By the text, of which one HTTP request may come with thousands of prompts. A few: they may be large.
        self._experts = lru_cache(maxsize=8)(self._experts_or_why)
        wanted = settings.default if settings.enabled and settings.default is not None else NONE
        self._default = parse_request(wanted)
        self.store: ProfileStore | None = None
        named = settings.profiles or settings.profile_store is not None or settings.manage is not None
        if settings.enabled and named:
            self.store = self._open_store()
        self.resolve_default()

    def resolve(self, request: SteeringRequest) -> Resolved | None:
        """The profile that a request asks for; None for `none`.

        Raises:
            SteerMoEError: it cannot be applied exactly.
        """
        return self._resolve_with({}, request)

    def resolve_experts(self, text: str) -> Resolved | None:
        """The profile of a text that lists experts; None if all are biases of 0.

        Raises:
            SteerMoEError: it cannot be read, or applied exactly.
        """
        resolved = _or_raise(self._experts(text))
        self._check_weight(resolved)
        return resolved

    def resolve_default(self) -> Resolved | None:
        """The operator's steering of requests that name none; None if there is none.

        Raises:
            SteerMoEError: it cannot be applied any more.
        """
        return self._resolve_with({}, self._default)

    def refuse(self, why: str) -> None:
        """Steer nothing any more; all that asks for it is refused with this reason."""
        self._shape = ConfigurationError(why)
        self._remembered.cache_clear()
        self._experts.cache_clear()

    def reads_store(self, request: SteeringRequest | None) -> bool:
        """Whether a request needs what the profile store says now.

        Args:
            request: None stands for the default.
        """
        spec = self._default if request is None else request
        return self.store is not None and bool(spec.named or set(spec.profiles) - set(self.store.fixed))

    def make_profile(self, text: str, *, fixed: bool = False) -> LoadedProfile:
        """Resolve a text to a profile that can be loaded under a name.

        Raises:
            SteerMoEError: it cannot be applied to this model, or names nothing that steers.
        """
        request = parse_request(text)
        if request.profiles:
            raise RequestError(f"a profile is made of behaviours or experts, not of @{request.profiles[0]}")
        resolved = self.resolve(request)
        if resolved is None:
            raise RequestError(f"a profile that steers nothing cannot be loaded; requests write {NONE} for that")
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return LoadedProfile(resolved, None if request.explicit else text.strip(), since, fixed)

    def check_default_with(self, name: str, profile: LoadedProfile) -> None:
        """Raise SteerMoEError if the default could no longer be applied once `profile` had that name."""
        self._resolve_with({name: profile}, self._default)

    def in_default(self, name: str) -> bool:
        """Whether the default steering uses the profile of that name."""
        return name in self._default.profiles

    def refresh_rankings(self) -> None:
        """Look rankings up anew from now on, in all processes that share the profile store.

        Raises:
            ConfigurationError: there is no store, so that nobody manages this server.
            SteerMoEError: the default could then no longer be applied; nothing is changed.
        """
        if self.store is None:
            raise ConfigurationError("this server keeps no profiles (settings 'manage' and 'profile_store')")
        if self._default:
            self._resolve(self._default, self._named(self._default, {}), PinnedRankings(self._registry))
        self.store.refresh()

    def _open_store(self) -> ProfileStore:
        settings = self._settings
        path = Path(settings.profile_store).absolute() if settings.profile_store else None
        store = ProfileStore(path, self._models, self._steerable())
        twice = sorted(set(settings.profiles) & set(store.current().profiles))
        if twice:
            raise PolicyError(f"profile {twice[0]!r} stands in the settings and in the profile store; leave one out")
        store.fixed = {name: self.make_profile(text, fixed=True) for name, text in settings.profiles.items()}
        return store

    def _resolve_with(self, instead: Mapping[str, LoadedProfile], request: SteeringRequest) -> Resolved | None:
        if not request:
            return None
        if request.explicit is not None and request is not self._default:
            # Not remembered: a caller could send a thousand large ones and fill the memory.
            resolved = self._resolve(request, (), self._used.rankings)
        else:
            resolved = _or_raise(self._remembered(request, self._named(request, instead), self._rankings_for(request)))
        self._check_weight(resolved)
        return resolved

    def _check_weight(self, resolved: Resolved | None) -> None:
        if resolved is not None and resolved.profile.weight == "own" and self.corrects is False:
            raise ProfileError(
                "weight=own: the routers of this model select by what they weigh, so an activated expert cannot keep "
                "its own weight; leave weight out"
            )

    def _named(self, request: SteeringRequest, instead: Mapping[str, LoadedProfile]) -> tuple[Resolved, ...]:
        """The loaded profiles that a request names, as they are now."""
        store = self.store if self.store is not None else Loaded({})
        return tuple((instead.get(name) or store.get(name)).resolved for name in request.profiles)

    def _rankings_for(self, request: SteeringRequest) -> PinnedRankings:
        used = self._used
        if request.named and self.store is not None:
            refreshed = self.store.refreshed()
            if refreshed != used.refreshed:
                self._used = used = _Used(refreshed, PinnedRankings(self._registry))
                self._remembered.cache_clear()
        return used.rankings

    def _resolve(
        self, request: SteeringRequest, loaded: tuple[Resolved, ...], rankings: PinnedRankings
    ) -> Resolved | None:
        return resolve(request, self._models, self._steerable(), rankings, self._settings.base_model, loaded)

    def _resolve_or_why(
        self, request: SteeringRequest, loaded: tuple[Resolved, ...], rankings: PinnedRankings
    ) -> Resolved | ProfileError | None:
        try:
            return self._resolve(request, loaded, rankings)
        except ProfileError as error:
            return copy.copy(error)  # Without what the traceback holds.

    def _experts_or_why(self, text: str) -> Resolved | SteerMoEError | None:
        try:
            return self._resolve(parse_request(text), (), self._used.rankings)
        except SteerMoEError as error:
            return copy.copy(error)

    def _steerable(self) -> MoEShape:
        return _or_raise(self._shape)


def _or_raise(found: T | SteerMoEError) -> T:
    if isinstance(found, SteerMoEError):
        # A copy: raising the same object again would lengthen its traceback for ever.
        raise copy.copy(found)
    return found
