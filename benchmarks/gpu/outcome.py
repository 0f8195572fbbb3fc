"""What one check found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """A named check, and what is wrong if it failed."""

    name: str
    fault: str | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return self.fault is None
