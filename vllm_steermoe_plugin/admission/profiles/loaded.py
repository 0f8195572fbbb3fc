"""Profiles that an operator has loaded into a server, as they are at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from expert_registry.errors import UnknownProfileError, one_of
from vllm_steermoe_plugin.steering.resolve import Resolved


@dataclass(frozen=True, slots=True)
class LoadedProfile:
    """A profile under a name. Its experts are those that were found when it was loaded, whatever the registry says.

    Attributes:
        resolved: the checked profile and its sources.
        asked: the request text that it was loaded from; None for an explicit expert list.
        since: when it was loaded, in ISO 8601, UTC.
        fixed: whether it stands in the settings.
    """

    resolved: Resolved
    asked: str | None
    since: str
    fixed: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    """All profiles of one moment, and how often the operator has asked for rankings to be looked up anew."""

    profiles: Mapping[str, LoadedProfile]
    refreshed: int = 0

    def get(self, name: str) -> LoadedProfile:
        """The profile of that name.

        Raises:
            UnknownProfileError: there is none; names those that there are.
        """
        found = self.profiles.get(name)
        if found is None:
            raise UnknownProfileError(one_of(name, self.profiles, "loaded profile"))
        return found
