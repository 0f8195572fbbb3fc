"""What can be pulled: where published rankings are, under which licence, and how they are checked.

The index that ships with the package is data, `pullable.json`. It holds no ranking.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from expert_registry.behaviours import canonical
from expert_registry.card import (
    DataRef,
    ModelRef,
    Name,
    RankingCard,
    Recommended,
    Sha256,
    Slug,
    SourceRef,
    Text,
    Version,
)
from expert_registry.documents import Strict, read_document
from expert_registry.errors import UnknownRankingError, one_of
from expert_registry.places import model_key
from expert_registry.shape import MoEShape

DEFAULT_INDEX = Path(__file__).parent / "pullable.json"
MAX_INDEX_BYTES = 1 << 20
MAX_FILE_BYTES = 8 << 20

_PART = re.compile(r"[A-Za-z0-9_\[][A-Za-z0-9_.\[\]-]*")


def _relative(path: str) -> str:
    """Each part of a path must be a plain name, so that it cannot lead out of a folder or a URL."""
    if not all(_PART.fullmatch(part) for part in path.split("/")):
        raise ValueError("must be a relative path of plain names")
    return path


RelativePath = Annotated[str, Field(max_length=400), AfterValidator(_relative)]
Size = Annotated[int, Field(ge=1, le=MAX_FILE_BYTES)]


class License(Strict):
    """The licence of a source; its text is fetched with the first ranking and stored beside it."""

    name: Text
    summary: Text
    path: RelativePath
    size: Size
    sha256: Sha256


class Source(Strict):
    """A repository of published rankings at one revision."""

    repository: Text
    revision: Text
    base_url: Annotated[str, Field(pattern=r"^https?://[^\s]+/$", max_length=400)]
    """Before a file's path; with the revision in it, so that it always gives the same file."""
    published: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    license: License


class CountedModel(Strict):
    """Shape of a model whose layers all have routed experts."""

    architecture: Name
    layers: Annotated[int, Field(ge=1, le=1024)]
    num_experts: Annotated[int, Field(ge=1, le=4096)]
    top_k: Annotated[int, Field(ge=1, le=4096)]

    @property
    def shape(self) -> MoEShape:
        return MoEShape(self.architecture, tuple(range(self.layers)), self.num_experts, self.top_k)


class CountedBehaviour(Strict):
    """How a behaviour was detected; see the ranking card's fields of the same names."""

    sides: tuple[Text, Text]
    data: Text
    span: Text
    safety: bool


class Pullable(Strict):
    """One published ranking."""

    model: Name
    behaviour: Slug
    version: Version
    source: Text
    path: RelativePath
    size: Size
    sha256: Sha256
    recommended: Recommended
    recommended_reverse: Recommended | None = None


class PullIndex(Strict):
    """All that can be pulled."""

    format_version: Literal[1] = 1
    sources: dict[str, Source]
    models: dict[str, CountedModel]
    behaviours: dict[str, CountedBehaviour]
    rankings: tuple[Pullable, ...]

    @model_validator(mode="after")
    def _complete(self) -> PullIndex:
        for item in self.rankings:
            if not (item.source in self.sources and item.model in self.models and item.behaviour in self.behaviours):
                raise ValueError(f"{item.model} {item.behaviour} names a source, model or behaviour that is not there")
        return self

    def find(self, model: str, behaviour: str | None = None) -> list[Pullable]:
        """The published rankings of a model, or that of one behaviour.

        Raises:
            UnknownRankingError: there is none; the message names what there is.
        """
        of_model = [item for item in self.rankings if model_key(item.model) == model_key(model)]
        if not of_model:
            known = {item.model for item in self.rankings}
            raise UnknownRankingError(f"nothing to pull: {one_of(model, known, 'model')}")
        if behaviour is None:
            return of_model
        known = {item.behaviour for item in of_model}
        asked = canonical(behaviour, known)
        if asked not in known:
            raise UnknownRankingError(f"nothing to pull for {model}: {one_of(behaviour, known, 'behaviour')}")
        return [item for item in of_model if item.behaviour == asked]

    def card(self, item: Pullable) -> RankingCard:
        """The ranking card of a converted ranking: the same for everybody, so that its hash is, too."""
        source, model, behaviour = self.sources[item.source], self.models[item.model], self.behaviours[item.behaviour]
        return RankingCard(
            model=ModelRef(id=item.model, architecture=model.architecture),
            num_experts=model.num_experts,
            top_k=model.top_k,
            behaviour=item.behaviour,
            version=item.version,
            sides=behaviour.sides,
            data=DataRef(name=behaviour.data),
            span=behaviour.span,
            safety=behaviour.safety,
            recommended=item.recommended,
            recommended_reverse=item.recommended_reverse,
            created=source.published,
            license=f"{source.license.name}: {source.license.summary}",
            note="Converted from the authors' release, which names neither checkpoint revision nor hash of the data.",
            source=SourceRef(
                repository=source.repository, revision=source.revision, path=item.path, sha256=item.sha256
            ),
        )


def load_index(path: Path = DEFAULT_INDEX) -> PullIndex:
    """Read an index file.

    Raises:
        RankingFormatError: it is unreadable, too large or not an index.
    """
    return read_document(path, PullIndex, MAX_INDEX_BYTES)
