"""What a ranking file says about itself: provenance, shape and recommended numbers."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from expert_registry.documents import Strict
from expert_registry.weights import Score

FORMAT_VERSION: Literal[1] = 1
DIAL_VERSION: Literal[2] = 2
"""Of files with weights of their own or a recommended strength, which older readers must not take for less."""


def _not_none(name: str) -> str:
    """`none` asks for no steering, so no behaviour may be called so."""
    if name == "none":
        raise ValueError("'none' is reserved")
    return name


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufffe\uffff]")
"""C0 and C1, which a terminal obeys; line separators; what overrides the direction of writing; no characters."""


def _printable(text: str) -> str:
    """Cards come from strangers and are shown on terminals, in logs and in figures."""
    found = _CONTROL.search(text)
    if found is not None:
        raise ValueError(f"holds the control character U+{ord(found[0]):04X}")
    return text


Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")]
SLUG = r"[a-z][a-z0-9_-]{0,63}"
"""Names of behaviours and of profiles, as a regular expression."""
Slug = Annotated[str, Field(pattern=rf"^{SLUG}$"), AfterValidator(_not_none)]
MAX_TEXT = 4000
Text = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(_printable)]
"""Words on one line, without control characters."""
_Tool = Annotated[str, Field(max_length=64), AfterValidator(_printable)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]
Version = Annotated[int, Field(ge=1, le=999_999)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ModelRef(Strict):
    """The checkpoint that was counted."""

    id: Name
    """Name by which rankings are looked up: a hub id, or `steermoe-lab`."""
    revision: Text = ""
    """Commit of the hub repository or hash of the weights; empty if unknown."""
    architecture: Name
    """First architecture in the checkpoint's config."""


class DataRef(Strict):
    """The contrastive pairs that were counted."""

    name: Text
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    """Hash of the pairs as they were read; empty if they are not at hand any more."""
    pairs: Annotated[int, Field(ge=0)] = 0


class Recommended(Strict):
    """How to steer by the ranking unless a request says otherwise: how many experts to force, or biases' strength."""

    activate: Count
    deactivate: Count
    strength: Annotated[float, Field(gt=0, le=16)] | None = None
    """Of biases in place of forced experts, in either direction."""
    top: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """How many of the largest weights give biases; None: all."""
    by: Score | None = None
    """What the weights are made of; None: the ranking's own, else risk differences."""

    @model_validator(mode="after")
    def _of_biases(self) -> Recommended:
        if self.strength is None and (self.top is not None or self.by is not None):
            raise ValueError("top and by say which biases there are, so they need a strength")
        return self

    def __str__(self) -> str:
        if self.strength is None:
            return f"activate {self.activate}, deactivate {self.deactivate}"
        top = "all" if self.top is None else f"the {self.top} largest"
        return f"strength {self.strength:g}, {top} weights" + (f" by {self.by}" if self.by else "")


class SourceRef(Strict):
    """The published file from which a ranking was converted."""

    repository: Text
    revision: Text
    """Commit at which the file was fetched."""
    path: Text
    sha256: Sha256
    """Of the file as published."""


class RankingCard(Strict):
    """The JSON header of a ranking file. All fields are bounded; unknown ones are refused."""

    format_version: Literal[1, 2] = FORMAT_VERSION
    model: ModelRef
    num_experts: Annotated[int, Field(ge=1, le=4096)]
    top_k: Annotated[int, Field(ge=1, le=4096)]
    behaviour: Slug
    version: Version
    sides: tuple[Text, Text]
    """Names of the positive side (the behaviour) and the negative side (its opposite)."""
    data: DataRef
    span: Text
    """Which tokens were counted."""
    safety: bool = False
    """Whether reversing this ranking lowers a safety behaviour."""
    recommended: Recommended
    recommended_reverse: Recommended | None = None
    """Numbers for the reversed direction, where they differ."""
    tools: dict[_Tool, _Tool] = Field(default_factory=dict, max_length=32)
    created: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    license: Text
    note: Text = ""
    source: SourceRef | None = None
    """Set for rankings converted from somebody else's release; left out of the file where there is none."""
    weights: Text = ""
    """How the ranking's own weights were made; left out of the file where it has none."""
