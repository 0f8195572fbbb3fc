"""From a side of a pair to token ids and the positions that count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_steermoe_plugin.pairs import ChatMessage, PairsError, Side

SPAN_RULE = "the target string if one is given, else the last assistant message, else the whole text"


_MARKER = "[[steermoe-answer]]"


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
    text = (side.text or "") if side.messages is None else _render(side.messages, tokenizer)
    if side.target is not None:
        # The last occurrence, so that an answer that repeats words of its question is found in the answer.
        start, length = text.rfind(side.target), len(side.target)
        if start < 0:
            raise PairsError(f"{origin}: the span {side.target!r:.60} is not in the rendered text {text!r:.120}")
    elif side.messages is not None:
        start, length = _last_answer(side.messages, tokenizer, text, origin)
    else:
        start, length = 0, len(text)
    return text, start, start + length


def _last_answer(messages: tuple[ChatMessage, ...], tokenizer: Any, text: str, origin: str) -> tuple[int, int]:
    """Start and length of the last assistant message in the rendered text.

    Found by rendering the chat once more with a marker in its place: the words of the answer may
    stand elsewhere too, in a question or in the template's own markup.
    """
    index = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
    if index < 0:
        raise PairsError(f"{origin}: no target is named and there is no assistant message to count")
    answer = messages[index]
    marked_answer = answer.model_copy(update={"content": _MARKER})
    marked = _render((*messages[:index], marked_answer, *messages[index + 1 :]), tokenizer)
    start = marked.find(_MARKER)
    # Many templates trim what they write.
    written = next((c for c in (answer.content, answer.content.strip()) if marked.replace(_MARKER, c) == text), None)
    if start < 0 or not written:
        raise PairsError(
            f"{origin}: the chat template does not write the answer {answer.content!r:.60} as it stands, "
            "so its place is unsure; name what counts by target_1 and target_2"
        )
    return start, len(written)


def _render(messages: tuple[ChatMessage, ...], tokenizer: Any) -> str:
    text: str = tokenizer.apply_chat_template([message.model_dump() for message in messages], tokenize=False)
    return text
