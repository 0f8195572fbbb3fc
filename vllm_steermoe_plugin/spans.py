"""From a side of a pair to token ids and the positions that count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_steermoe_plugin.pairs import ChatMessage, PairsError, Side

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
    if side.messages is None:
        text, wanted, first, last = side.text or "", side.target or side.text or "", 0, len(side.text or "")
    else:
        text = _render(side.messages, tokenizer)
        wanted, first, last = side.target or "", 0, len(text)
        if side.target is None:
            wanted, first, last = _last_answer(side, tokenizer, text, origin)
    # A target is named by its last occurrence, so that an answer that repeats words of its question is
    # found in the answer. An answer begins its turn, so there it is the first.
    find = text.find if side.messages is not None and side.target is None else text.rfind
    start = find(wanted, first, last)
    if start < 0 or not wanted:
        raise PairsError(f"{origin}: the span {wanted!r:.60} is not in the rendered text {text!r:.120}")
    return text, start, start + len(wanted)


def _last_answer(side: Side, tokenizer: Any, text: str, origin: str) -> tuple[str, int, int]:
    """The last assistant message and the character range of its turn, which only it can lie in."""
    messages = side.messages or ()
    index = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
    if index < 0:
        raise PairsError(f"{origin}: no target is named and there is no assistant message to count")
    before = _render(messages[:index], tokenizer) if index else ""
    # Where the template opens the answer's turn as it would for generating, the markers of that are passed too.
    opened = _render(messages[:index], tokenizer, add_generation_prompt=True) if index else ""
    if text.startswith(opened):
        before = opened
    upto = _render(messages[: index + 1], tokenizer)
    if not text.startswith(before) or not text.startswith(upto):
        raise PairsError(
            f"{origin}: the chat template writes earlier turns differently once later ones follow, "
            "so the answer's place is unsure; name it by target_1 and target_2"
        )
    return messages[index].content, len(before), len(upto)


def _render(messages: tuple[ChatMessage, ...], tokenizer: Any, *, add_generation_prompt: bool = False) -> str:
    turns = [message.model_dump() for message in messages]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    return text
