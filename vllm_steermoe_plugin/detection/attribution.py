"""Which way each token of a text leans: the risk differences of the experts that its router selected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from expert_registry import RankedExpert, Ranking
from expert_registry.errors import ConfigurationError, EngineError, ProfileError
from vllm_steermoe_plugin.detection.engine_client import COUNT_GROUPS, count_groups, sent, take_counts
from vllm_steermoe_plugin.detection.pairs import ChatMessage, PairsError
from vllm_steermoe_plugin.detection.token_spans import render_chat
from vllm_steermoe_plugin.detection.tokenizer import offset_tokenizer
from vllm_steermoe_plugin.models.architectures import shape_of
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans

if TYPE_CHECKING:
    from vllm import LLM

_NAMED = 3
"""Experts that are named for each token."""


@dataclass(frozen=True, slots=True)
class AttributedToken:
    """A token of a text, or some that share a character of it.

    Attributes:
        text: its characters; empty for tokens without any, such as a beginning of text.
        score: mean over the MoE layers of the summed risk differences of its experts; above 0 for the positive side. Of
            several tokens, their mean.
        experts: those that weigh most.
    """

    text: str
    score: float
    experts: tuple[RankedExpert, ...]


def attribute(
    engine: LLM, ranking: Ranking, text: str | Sequence[ChatMessage], top: int | None = None
) -> list[AttributedToken]:
    """Score each token of a text by the experts that the model's router selects for it.

    Args:
        engine: runs the model that was ranked, with the setting `count_groups`: that many tokens are
            looked at in one pass over the text.
        ranking: gives the risk differences.
        text: plain, or a chat.
        top: only the first so many experts of the ranking weigh; None for all.

    Raises:
        ProfileError: the ranking is of a model of another shape.
        PairsError: the text is empty or longer than the context.
        ConfigurationError: the engine does not count.
        UnsupportedFeatureError: its tokenizer gives no character offsets.
    """
    config = engine.llm_engine.vllm_config.model_config
    shape = shape_of(config.hf_config, config.architecture)
    if ranking.shape != shape:
        raise ProfileError(f"the ranking is of {ranking.shape}, but the engine runs {shape}")
    groups = count_groups(engine)
    if not groups:
        raise ConfigurationError(
            f"this engine does not count; start it with the setting 'count_groups' at {COUNT_GROUPS}"
        )
    tokenizer = offset_tokenizer(engine)
    plain = isinstance(text, str)
    written = text if isinstance(text, str) else render_chat(tuple(text), tokenizer, "the chat")
    special = plain or not tokenizer.chat_template
    encoding = tokenizer(written, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    if not 0 < len(ids) < config.max_model_len:
        raise PairsError(f"the text has {len(ids)} tokens; the context holds 1 to {config.max_model_len - 1}")
    weights = _weights(ranking, top)
    engine.collective_rpc("steermoe_reset_counts")
    found = []
    for start in range(0, len(ids), groups):
        stop = min(start + groups, len(ids))
        with sent(engine, [(ids, CountedSpans(1, ((start, stop),), each=True))]):
            engine.wait_for_completion(use_tqdm=False)
        selections, tokens = take_counts(engine, shape.layers)
        if not (tokens[: stop - start] == 1).all():
            raise EngineError("tokens of the text were not counted once each; is the engine used by something else?")
        found += [_scored(selected * weights, shape.layers) for selected in selections[: stop - start]]
    return [AttributedToken(piece, *_joined(found[part])) for piece, part in _pieces(written, offsets)]


def _weights(ranking: Ranking, top: int | None) -> NDArray[np.float64]:
    """Risk differences `[L, E]`, zero beyond the first `top` experts."""
    difference = ranking.counts.risk_difference()
    if top is None:
        return difference
    kept = np.zeros_like(difference)
    rows = ranking.shape.rows
    for expert in ranking.experts()[:top]:
        kept[rows[expert.layer], expert.expert] = expert.risk_difference
    return kept


def _scored(values: NDArray[np.float64], layers: tuple[int, ...]) -> tuple[float, tuple[RankedExpert, ...]]:
    """Score and weightiest experts of a token; `values` is `[L, E]`, zero for what was not selected."""
    order = np.argsort(-np.abs(values), axis=None, kind="stable")[:_NAMED]
    size = values.shape[1]
    experts = (RankedExpert(layers[i // size], int(i % size), float(values.flat[i])) for i in order.tolist())
    return float(values.sum() / len(layers)), tuple(e for e in experts if e.risk_difference)


def _joined(scored: Sequence[tuple[float, tuple[RankedExpert, ...]]]) -> tuple[float, tuple[RankedExpert, ...]]:
    """Mean score of tokens that are shown as one, and the weightiest of their experts."""
    experts = dict.fromkeys(expert for _, some in scored for expert in some)
    order = sorted(experts, key=lambda expert: -abs(expert.risk_difference))
    return sum(score for score, _ in scored) / len(scored), tuple(order[:_NAMED])


def _pieces(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[str, slice]]:
    """The text cut at its tokens, each piece with its tokens: joined again, the pieces are the text.

    A character that is several tokens, such as a picture written byte by byte, is one piece.
    """
    starts: list[int] = []
    done = 0
    for number, (start, end) in enumerate(offsets):
        if not (starts and start < end <= done):
            starts.append(number)
        done = max(done, end)
    pieces = []
    begin = 0
    for first, after in zip(starts, [*starts[1:], len(offsets)], strict=True):
        # Characters between two tokens, such as white space that the tokenizer drops, go with the later one.
        stop = len(text) if after == len(offsets) else max(begin, *(end for _, end in offsets[first:after]))
        pieces.append((text[begin:stop], slice(first, after)))
        begin = stop
    return pieces
