"""Layer indices as people write them: `1-27` or `0,2,4-9`."""

from __future__ import annotations

import re

from expert_registry.errors import UsageError

_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")


def parse_layers(text: str) -> tuple[int, ...]:
    """The indices, which must ascend.

    Raises:
        UsageError: it is not that.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or (layers and first <= layers[-1]):
            raise UsageError(f"layers {text!r:.80}: write ascending indices and ranges such as 1-27 or 0,2,4-9")
        layers += range(first, last + 1)
    return tuple(layers)
