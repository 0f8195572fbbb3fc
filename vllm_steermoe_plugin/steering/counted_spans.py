"""Which tokens of a request have their routing counted, and into which group."""

from __future__ import annotations

import json
from dataclasses import dataclass

from expert_registry.errors import RequestError


@dataclass(frozen=True, slots=True)
class CountedSpans:
    """Position ranges of a request's tokens, counted into one group, or each into its own.

    Attributes:
        group: 1..G.
        ranges: half-open position ranges `[start, stop)`, ascending and disjoint.
        each: the first counted token goes into `group`, the next into `group + 1`, and so on.
    """

    group: int
    ranges: tuple[tuple[int, int], ...]
    each: bool = False

    def __post_init__(self) -> None:
        edges = [edge for span in self.ranges for edge in span]
        if self.group < 1 or not edges or edges[0] < 0 or any(a >= b for a, b in self.ranges) or edges != sorted(edges):
            raise RequestError(f"counted ranges must be ascending, disjoint and not empty, got {self}")

    @property
    def tokens(self) -> int:
        """Number of positions in the ranges."""
        return sum(stop - start for start, stop in self.ranges)

    @property
    def last_group(self) -> int:
        """The highest group that is counted into."""
        return self.group + self.tokens - 1 if self.each else self.group

    def to_json(self) -> str:
        each = {"each": True} if self.each else {}
        return json.dumps({"group": self.group, "ranges": self.ranges} | each, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: object) -> CountedSpans:
        """Read what `to_json` wrote.

        Raises:
            RequestError: it is something else.
        """
        try:
            value = json.loads(text) if isinstance(text, str) else None
            group, ranges = value["group"], tuple((start, stop) for start, stop in value["ranges"])  # type: ignore[index]
            each = value.get("each", False)  # type: ignore[union-attr]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise RequestError(f"counted spans must be JSON with group and ranges, got {text!r:.80}") from None
        if any(type(number) is not int for number in (group, *(edge for span in ranges for edge in span))):
            raise RequestError(f"group and ranges must be integers, got {text!r:.80}")
        if type(each) is not bool:
            raise RequestError(f"each must be true or false, got {text!r:.80}")
        return cls(group, ranges, each)
