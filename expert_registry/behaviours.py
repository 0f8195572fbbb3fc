"""Names of behaviours as people write them."""

from __future__ import annotations

import re
from collections.abc import Container

from expert_registry.errors import UnknownRankingError

ALIASES = {"faithful": "faithfulness", "safe": "safety"}
"""Words for the behaviours of the paper. None reverses: that is a direction, not a behaviour."""

LATEST = "latest"
_VERSION = re.compile(r"[1-9][0-9]{0,5}")


def canonical(behaviour: str, known: Container[str]) -> str:
    """The behaviour that is meant: the word itself where it is known, else what it is an alias of."""
    name = behaviour.strip().lower()
    return name if name in known else ALIASES.get(name, name)


def parse_reference(text: str) -> tuple[str, int | None]:
    """`behaviour`, `behaviour@latest` or `behaviour@3` as behaviour and version (None: the newest).

    Raises:
        UnknownRankingError: what stands behind `@` is no version.
    """
    behaviour, at, version = text.partition("@")
    if not at or version == LATEST:
        return behaviour, None
    if not _VERSION.fullmatch(version):
        raise UnknownRankingError(f"{text[:80]!r}: a version is a number or {LATEST!r}, got {version[:80]!r}")
    return behaviour, int(version)
