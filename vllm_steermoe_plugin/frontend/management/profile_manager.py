"""What an operator may do with the profiles of a running server, as plain values for HTTP."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from expert_registry.errors import PolicyError, RequestError
from vllm_steermoe_plugin.admission.profiles.loaded import LoadedProfile
from vllm_steermoe_plugin.admission.profiles.store import ProfileStore
from vllm_steermoe_plugin.admission.resolver import Resolver
from vllm_steermoe_plugin.steering.request import NONE, PROFILE_NAME


@dataclass(frozen=True, slots=True)
class ProfileManager:
    """List, load, replace and drop profiles. Requests that are under way keep what they started with."""

    resolver: Resolver

    def list(self) -> dict[str, Any]:
        """All profiles, by name."""
        loaded = self._store.current().profiles
        return {"profiles": [self._summary(name, loaded[name]) for name in sorted(loaded)]}

    def show(self, name: str) -> dict[str, Any]:
        """One profile with its experts.

        Raises:
            UnknownProfileError: there is none of that name.
        """
        profile = self._store.current().get(name)
        return {**self._summary(name, profile), "experts": json.loads(profile.resolved.profile.to_json())}

    def load(self, name: str, text: str) -> tuple[dict[str, Any], bool]:
        """Load a profile, and whether it replaced one. It is in use as a whole or not at all.

        Args:
            name: a name; requests write `@NAME`.
            text: as a request would ask for it: behaviours, or a JSON expert list.

        Raises:
            SteerMoEError: the name or the text is none, it cannot be applied to this model, or the name stands in
                the settings.
        """
        _check_name(name)
        profile = self.resolver.make_profile(text)
        replaced = self._store.put(name, profile, lambda: self.resolver.check_default_with(name, profile))
        return self._summary(name, profile), replaced

    def drop(self, name: str) -> dict[str, Any]:
        """Drop a profile.

        Raises:
            UnknownProfileError: there is none of that name.
            PolicyError: it stands in the settings, or the default steering uses it.
        """
        if self.resolver.in_default(name) and name not in self._store.fixed:
            raise PolicyError(f"profile {name!r} is the default steering of this server; replace it instead")
        return self._summary(name, self._store.drop(name))

    def refresh(self) -> dict[str, Any]:
        """Look rankings up anew from now on. Loaded profiles keep their experts.

        Raises:
            SteerMoEError: the default could no longer be applied; nothing is changed.
        """
        self.resolver.refresh_rankings()
        return {"refreshed": self._store.current().refreshed}

    @property
    def _store(self) -> ProfileStore:
        if self.resolver.store is None:
            raise PolicyError("steering is switched off on this server (setting 'enabled')")
        return self.resolver.store

    def _summary(self, name: str, profile: LoadedProfile) -> dict[str, Any]:
        steering = profile.resolved.profile
        return {
            "name": name,
            "digest": steering.digest,
            "asked": profile.asked,
            "phase": steering.phase,
            "weight": steering.weight,
            "activated": len(steering.activate),
            "deactivated": len(steering.deactivate),
            "biased": len(steering.bias),
            "layers": sorted(
                {layer for layer, _ in steering.activate | steering.deactivate} | {layer for layer, *_ in steering.bias}
            ),
            "sources": [source.to_dict() | {"reverse": source.reverse} for source in profile.resolved.sources],
            "since": profile.since,
            "fixed": profile.fixed,
            "default": self.resolver.in_default(name),
        }


def _check_name(name: str) -> None:
    if not PROFILE_NAME.fullmatch(name) or name == NONE:
        raise RequestError(
            f"{name!r:.80} cannot name a profile: lower-case letters, digits, _ and -, beginning with a letter, "
            f"at most 64, and not {NONE!r}"
        )
