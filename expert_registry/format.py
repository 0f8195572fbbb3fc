"""Ranking files: bounded, validated reading and atomic writing. The format is in README.md."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from expert_registry.card import DIAL_VERSION, FORMAT_VERSION, RankingCard
from expert_registry.clusters import OPTIONAL_AXES, SUMMARY_AXES, ClusterSummary
from expert_registry.counts import RoutingCounts
from expert_registry.documents import parse_document
from expert_registry.errors import ProfileError, RankingFormatError
from expert_registry.files import read_bounded, write_atomic
from expert_registry.ranking import Ranking
from expert_registry.weights import MAX_WEIGHT

SUFFIX = ".safetensors"
CARD_KEY = "steermoe"
MAX_BYTES = 64 << 20
MAX_CARD_BYTES = 1 << 16
"""Of the whole header: the ranking card and the entries of the tensors."""
_ENTRIES = 4096
"""What the entries of the tensors take at most."""
_NDIM = {"activations_1": 2, "activations_2": 2, "tokens": 1, "layers": 1}
_WEIGHTS = "weights"
_YOUNGER = ("source", _WEIGHTS, "strength", "top", "by")
"""Fields that the first files did not have. Left out where empty, they leave those their bytes and hashes."""


def dump_ranking(ranking: Ranking) -> bytes:
    """The file's bytes; equal rankings give equal bytes.

    Raises:
        RankingFormatError: the counts are impossible, or no reader would take so long a card.
    """
    ranking.counts.check(ranking.shape)
    tensors: dict[str, NDArray[Any]] = {
        name: np.ascontiguousarray(getattr(ranking.counts, name), dtype=np.int64) for name in _NDIM
    }
    if ranking.clusters is not None:
        ranking.clusters.check(ranking.counts, ranking.shape)
        tensors |= ranking.clusters.tensors()
    if ranking.weights is not None:
        tensors[_WEIGHTS] = np.ascontiguousarray(ranking.weights, dtype=np.float32)
    _check_weights(ranking)
    check_card_size(ranking.card)
    return save_tensors(tensors, metadata={CARD_KEY: _card_json(ranking.card)})


def check_card_size(card: RankingCard) -> None:
    """Raise RankingFormatError if a file with this ranking card could not be read again.

    Each of its texts is bounded, but in JSON a character can take fourteen bytes.
    """
    size, most = len(json.dumps(_card_json(card))), MAX_CARD_BYTES - _ENTRIES
    if size > most:
        raise RankingFormatError(f"the card would take {size} bytes in the file, at most {most} fit; shorten its texts")


def _card_json(card: RankingCard) -> str:
    """JSON with sorted keys, so that the order in which tools were named does not matter."""
    fields = card.model_dump(mode="json")
    for part in (fields, fields["recommended"], fields["recommended_reverse"] or {}):
        for name in _YOUNGER:
            if part.get(name) in (None, ""):
                part.pop(name, None)
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def version_of(ranking: Ranking) -> Literal[1, 2]:
    """The format version of the file of a ranking with these parts."""
    numbers = (ranking.card.recommended, ranking.card.recommended_reverse)
    strong = any(number is not None and number.strength is not None for number in numbers)
    return DIAL_VERSION if strong or ranking.weights is not None else FORMAT_VERSION


def _check_weights(ranking: Ranking) -> None:
    """Raise RankingFormatError unless weights are `[L, E]` and bounded, and the card fits them, in its version too."""
    card, weights = ranking.card, ranking.weights
    if (weights is not None) != bool(card.weights):
        there, missing = ("text", "tensor") if weights is None else ("tensor", "text")
        raise RankingFormatError(
            f"there is a {there} `weights` without the {missing}; the card of a ranking with weights of its own says "
            "how they were made, and no other does"
        )
    numbers = (card.recommended, card.recommended_reverse)
    if weights is None and any(number is not None and number.by == "own" for number in numbers):
        raise RankingFormatError("by=own is recommended, but the ranking has no weights of its own")
    if weights is not None:
        expected = ranking.counts.activations_1.shape
        if weights.dtype != np.float32 or weights.shape != expected:
            raise RankingFormatError(f"weights must be float32 {expected}, got {weights.dtype} {weights.shape}")
        if not (np.abs(weights) <= MAX_WEIGHT).all() or not weights.any():
            raise RankingFormatError(f"weights must lie between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}, and not all be 0")
    if card.format_version != version_of(ranking):
        raise RankingFormatError(
            f"format version {card.format_version}, but files with weights or a recommended strength are of version "
            f"{DIAL_VERSION}, all others of version {FORMAT_VERSION}"
        )


def content_hash(data: bytes) -> str:
    """sha256 of a ranking file's bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def write_ranking(ranking: Ranking, path: Path, *, overwrite: bool = False) -> None:
    """Write a ranking file atomically: a reader sees the whole file or none.

    Raises:
        FileError: it cannot be written.
        RankingFormatError: the file exists and `overwrite` is not given, or see `dump_ranking`.
    """
    write_bytes(dump_ranking(ranking), path, overwrite=overwrite)


def write_bytes(data: bytes, path: Path, *, overwrite: bool = False) -> None:
    """Like `write_ranking`, for bytes that are a ranking file already."""
    try:
        write_atomic(path, data, overwrite=overwrite)
    except FileExistsError:
        raise RankingFormatError(f"{path} exists; rankings are immutable, so write a new version") from None


def read_card(path: Path, *, inside: Path | None = None) -> RankingCard:
    """Read only the header of a ranking file (cheap: no tensor is loaded; `inside`: see `read_bounded`).

    Raises:
        FileError: it cannot be read.
        RankingFormatError: the header is missing, too large or not as README.md says.
    """
    data = read_bounded(path, 8 + MAX_CARD_BYTES, head=True, inside=inside)
    return _card(_header(data[:8], data[8:]), str(path))


def read_ranking(path: Path) -> Ranking:
    """Read and validate a whole ranking file.

    Raises:
        FileError: it cannot be read, or is too large.
        RankingFormatError: not a ranking file, of an unknown version, or with impossible counts.
    """
    return parse_ranking(read_bytes(path), str(path))


def read_bytes(path: Path, *, inside: Path | None = None) -> bytes:
    """The bytes of a ranking file, of which no more than MAX_BYTES are ever read (`inside`: see `read_bounded`).

    Raises:
        FileError: the file cannot be read or is too large.
    """
    return read_bounded(path, MAX_BYTES, inside=inside)


def parse_ranking(data: bytes, name: str) -> Ranking:
    """Like `read_ranking`, from bytes; `name` stands in the errors."""
    header = _header(data[:8], data[8 : 8 + MAX_CARD_BYTES])
    card = _card(header, name)
    _check_dtypes(header, name)
    try:
        tensors = load_tensors(data)
    except SafetensorError as error:
        raise RankingFormatError(f"{name} is not a safetensors file: {error}") from None
    summary: dict[str, int] = {}
    if set(tensors) & set(SUMMARY_AXES | OPTIONAL_AXES):
        summary = SUMMARY_AXES | {key: ndim for key, ndim in OPTIONAL_AXES.items() if key in tensors}
    axes = _NDIM | summary
    weights = tensors.pop(_WEIGHTS, None)
    if set(tensors) != set(axes):
        raise RankingFormatError(f"{name} holds tensors {sorted(tensors)}; a ranking holds {sorted(axes)}")
    for key, ndim in axes.items():
        if tensors[key].dtype != np.int64 or tensors[key].ndim != ndim:
            found = f"{tensors[key].dtype} with {tensors[key].ndim} axes"
            raise RankingFormatError(f"{name}: {key} must be int64 with {ndim} axes, got {found}")
    if tensors["tokens"].shape != (2,):
        raise RankingFormatError(f"{name}: tokens must have shape [2], got {list(tensors['tokens'].shape)}")
    counts = RoutingCounts(**{key: tensors[key] for key in _NDIM})
    clusters = ClusterSummary(**{key: tensors[key] for key in summary}) if summary else None
    ranking = Ranking(counts, card, clusters, weights)
    try:
        counts.check(ranking.shape)
        if clusters is not None:
            clusters.check(counts, ranking.shape)
        _check_weights(ranking)
    except (RankingFormatError, ProfileError) as error:
        raise RankingFormatError(f"{name}: {error}") from None
    return ranking


def _header(length: bytes, head: bytes) -> bytes:
    """The JSON header of a safetensors file, refused when it is longer than a ranking's can be."""
    if len(length) < 8:
        return b""
    (size,) = struct.unpack("<Q", length)
    return head[:size] if size <= MAX_CARD_BYTES else b""


def _check_dtypes(header: bytes, name: str) -> None:
    """Refuse other tensors before they are loaded: numpy has no name for some of safetensors' types."""
    entries = {key: value for key, value in json.loads(header).items() if key != "__metadata__"}
    for key, value in entries.items():
        dtype = value.get("dtype") if isinstance(value, dict) else None
        wanted = "F32" if key == _WEIGHTS else "I64"
        if dtype != wanted:
            raise RankingFormatError(f"{name}: {key:.80} must be of type {wanted}, got {dtype!r:.80}")


def _card(header: bytes, name: str) -> RankingCard:
    try:
        metadata = json.loads(header).get("__metadata__", {})
        text = metadata[CARD_KEY]
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise RankingFormatError(f"{name} is not a ranking file: it has no {CARD_KEY!r} header") from None
    if not isinstance(text, str):
        raise RankingFormatError(f"{name} is not a ranking file: its {CARD_KEY!r} header is not text")
    return parse_document(text, RankingCard, name)
