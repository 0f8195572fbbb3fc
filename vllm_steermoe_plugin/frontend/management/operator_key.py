"""The key that lets an operator manage profiles: where it comes from, and how a caller shows it.

Only its sha256 is kept. It is not vLLM's `--api-key`, which every caller of the model has.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from expert_registry.errors import ConfigurationError, FileError
from expert_registry.files import read_bounded

MIN_LENGTH = 16
_MAX_BYTES = 4096
_KEY = re.compile(rf"[!-~]{{{MIN_LENGTH},{_MAX_BYTES}}}")


@dataclass(frozen=True, slots=True, repr=False)
class OperatorKey:
    """The sha256 of a key."""

    digest: bytes

    def matches(self, authorization: str | None) -> bool:
        """Whether an `Authorization` header carries the key, as `Bearer KEY`. Takes equally long for all wrong ones."""
        scheme, _, key = (authorization or "").partition(" ")
        return scheme.lower() == "bearer" and self.is_key(key)

    def is_key(self, key: str) -> bool:
        """Whether it is this key."""
        return hmac.compare_digest(_digest(key), self.digest)


def read_key(source: str, environment: Mapping[str, str] = os.environ) -> OperatorKey:
    """Read the key from where the setting `manage` says, `env:NAME` or `file:PATH`.

    Raises:
        EngineError: it is not there, too short, or holds what no HTTP header can.
    """
    kind, _, place = source.partition(":")
    if kind == "env":
        key = environment.get(place, "")
    else:
        try:
            key = read_bounded(Path(place), _MAX_BYTES).decode("ascii").strip()
        except (FileError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"setting 'manage': no key can be read from {place}: {error}") from None
    if not _KEY.fullmatch(key):
        raise ConfigurationError(
            f"setting 'manage': {source} must hold a key of at least {MIN_LENGTH} printable characters without "
            f"spaces; what is there has {len(key)} characters"
        )
    return OperatorKey(_digest(key))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
