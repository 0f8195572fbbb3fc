"""From a document and the generated text to the value of the metric; the lab's world is the judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_steermoe_plugin.lab import world

Document = Mapping[str, str]


def shows(document: Document, results: Sequence[str]) -> dict[str, float]:
    """1 if the text begins with the behaviour's answer."""
    return {"shows": float(world.shows(document["behaviour"], world.Example(**document), results[0]))}


def correct(document: Document, results: Sequence[str]) -> dict[str, float]:
    """1 if the text is exactly the answer."""
    return {"correct": float(world.correct(world.Example(**document), results[0]))}
