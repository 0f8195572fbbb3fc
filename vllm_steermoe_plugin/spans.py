"""From a side of a pair to token ids and the positions that count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_steermoe_plugin.pairs import PairsError, Side

SPAN_RULE = "the target string if one is given, else the last assistant message, else the whole text"


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Token ids of a text and the half-open range of positions that count."""

    token_ids: tuple[int, ...]
    start: int
    stop: int


def encode_side(side: Side, tokenizer: Any, origin: str) -> TokenSpan:
    """Render, tokenise and find the counted span of one side.

    A token counts if any of its characters lies in the span, so a token that merges
    across the boundary counts.

    Args:
        side: what to encode.
        tokenizer: a fast Hugging Face tokenizer (it must give character offsets).
        origin: names the pair in errors.

    Raises:
        PairsError: the span is not found or holds no token.
    """
    text, start, stop = _characters(side, tokenizer, origin)
    encoding = tokenizer(text, add_special_tokens=side.messages is None, return_offsets_mapping=True)
    covered = [i for i, (a, b) in enumerate(encoding["offset_mapping"]) if a < stop and b > start]
    if not covered:
        raise PairsError(f"{origin}: the counted span {text[start:stop]!r:.60} holds no token")
    return TokenSpan(tuple(encoding["input_ids"]), covered[0], covered[-1] + 1)


def _characters(side: Side, tokenizer: Any, origin: str) -> tuple[str, int, int]:
    """The rendered text and the character range of the span in it."""
    if side.messages is not None:
        messages = [message.model_dump() for message in side.messages]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    else:
        text = side.text or ""
    if side.target is not None:
        wanted = side.target
    elif side.messages is not None:
        answers = [message.content for message in side.messages if message.role == "assistant"]
        if not answers:
            raise PairsError(f"{origin}: no target is named and there is no assistant message to count")
        wanted = answers[-1]
    else:
        wanted = text
    # The last occurrence, so that an answer that repeats words of its question is found in the answer.
    start = text.rfind(wanted)
    if start < 0 or not wanted:
        raise PairsError(f"{origin}: the span {wanted!r:.60} is not in the rendered text {text!r:.120}")
    return text, start, start + len(wanted)
