"""The rankings that a server has used: a name means the same file until the operator refreshes.

Without it, `digits` would become another ranking in the middle of the day because a new version was published,
at a moment that depends on what happens to be remembered; and a file that was replaced under its old version
would steer under the old name.
"""

from __future__ import annotations

from collections.abc import Sequence

from expert_registry import Registry
from expert_registry.errors import UnknownRankingError
from expert_registry.registry import Found
from expert_registry.shape import MoEShape


class PinnedRankings:
    """A registry of which each name, once found, stands for one file by its sha256.

    It grows with the rankings that exist, not with what is asked for: failures are not remembered.
    """

    def __init__(self, registry: Registry) -> None:
        """Pin nothing yet."""
        self.registry = registry
        self._pins: dict[tuple[str, int | None], str] = {}
        self._files: dict[str, str] = {}

    def find(
        self,
        models: Sequence[str],
        behaviour: str,
        *,
        version: int | None = None,
        shape: MoEShape | None = None,
        base_model: str | None = None,
    ) -> Found:
        """As `Registry.find`, but what was found before is found again or nothing is.

        Raises:
            UnknownRankingError: nothing fits, or no longer the file that was used before.
            RankingFormatError: the file that fits is damaged.
        """
        pin = self._pins.get((behaviour, version))
        try:
            found = self.registry.find(
                models, behaviour, version=version, shape=shape, base_model=base_model, sha256=pin
            )
        except UnknownRankingError as error:
            if pin is None:
                raise
            raise UnknownRankingError(f"{_changed(behaviour, pin)}: {error}", paths=error.paths) from None
        used = self._files.setdefault(found.entry.name, found.sha256)
        if used != found.sha256:
            raise UnknownRankingError(f"{_changed(found.entry.name, used)}: its sha256 is {found.sha256} now")
        self._pins.setdefault((behaviour, version), found.sha256)
        return found


def _changed(name: str, sha256: str) -> str:
    return (
        f"{name} changed on disk (expected sha256 {sha256}). Versions are immutable: publish a new version, then the "
        "operator can refresh the rankings of this server (POST /steermoe/rankings/refresh) or restart it"
    )
