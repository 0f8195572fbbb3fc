"""From a side of a pair to token ids and the positions that count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vllm_steermoe_plugin.detection.pairs import ALL, ChatMessage, PairsError, Side

_MARKER = "[[steermoe-answer]]"
_SPACE = "Ġ"
"""A space in a token's name, in byte-level vocabularies."""

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Token ids of a text and the positions that count.

    Attributes:
        token_ids: of the whole text.
        ranges: half-open position ranges, ascending and disjoint.
        merged: tokens at the edge of what counts that also cover characters outside; they count.
    """

    token_ids: tuple[int, ...]
    ranges: Ranges
    merged: int = field(default=0, compare=False)

    @property
    def start(self) -> int:
        """First counted position."""
        return self.ranges[0][0]

    @property
    def stop(self) -> int:
        """One after the last counted position."""
        return self.ranges[-1][1]

    @property
    def tokens(self) -> int:
        """Number of counted positions."""
        return sum(stop - start for start, stop in self.ranges)

    def first(self, number: int) -> TokenSpan:
        """The same text with only the first `number` counted positions."""
        kept = []
        for start, stop in self.ranges:
            size = min(stop - start, number)
            if size > 0:
                kept.append((start, start + size))
            number -= size
        return TokenSpan(self.token_ids, tuple(kept), self.merged)


def encode_side(side: Side, tokenizer: Any, origin: str) -> TokenSpan:
    """Render, tokenise and find the counted span of one side; see `encode_sides`.

    Raises:
        PairsError: the span is not found or holds no token.
    """
    (encoded,) = encode_sides([(side, origin)], tokenizer)
    if isinstance(encoded, PairsError):
        raise encoded
    return encoded


def encode_sides(sides: Sequence[tuple[Side, str]], tokenizer: Any) -> list[TokenSpan | PairsError]:
    """Render, tokenise and find the counted spans of many sides at once.

    A token counts if any of its characters lies in the span, so a token that merges
    across the boundary counts.

    Args:
        sides: each with the origin that names it in errors.
        tokenizer: a fast Hugging Face tokenizer (it must give character offsets).

    Returns:
        For each side its tokens, or why it has none that count: a span is not found, or holds no token.
    """
    found: dict[int, TokenSpan | PairsError] = {}
    texts: dict[bool, list[tuple[int, str, Ranges]]] = {True: [], False: []}
    for place, (side, origin) in enumerate(sides):
        try:
            text, spans = _characters(side, tokenizer, origin)
        except PairsError as error:
            found[place] = error
            continue
        # A chat template writes the special tokens itself; without one they are added as to any text.
        texts[side.messages is None or not tokenizer.chat_template].append((place, text, spans))
    for special, some in texts.items():
        if not some:
            continue
        # All in one call: the tokenizer then leaves Python alone for as long, and so the engine beside it.
        # Not `verbose`: texts that are too long are ours to refuse, by name.
        encoding = tokenizer(
            [text for _, text, _ in some], add_special_tokens=special, return_offsets_mapping=True, verbose=False
        )
        for row, (place, text, spans) in enumerate(some):
            ids, offsets = encoding["input_ids"][row], encoding["offset_mapping"][row]
            whole = partial(_with_spaces, text, ids, offsets, tokenizer)
            ranges, merged = _positions(offsets, spans, whole)
            if ranges:
                found[place] = TokenSpan(tuple(ids), ranges, merged)
            else:
                shown = "".join(text[start:stop] for start, stop in spans)
                found[place] = PairsError(f"{sides[place][1]}: the counted span {shown!r:.60} holds no token")
    return [found[place] for place in range(len(sides))]


def balanced(one: TokenSpan, other: TokenSpan) -> tuple[TokenSpan, TokenSpan]:
    """Both with as many counted tokens as the shorter has, from the beginning of each."""
    number = min(one.tokens, other.tokens)
    return one.first(number), other.first(number)


def _positions(
    offsets: Sequence[tuple[int, int]], spans: Ranges, whole: Callable[[int], tuple[int, int]]
) -> tuple[Ranges, int]:
    """Token ranges that touch the character ranges `spans`, and how many tokens reach over an edge.

    `whole` gives the characters of a token with the spaces that its offsets may leave out.
    """
    ranges: list[tuple[int, int]] = []
    merged = 0
    for start, stop in spans:
        covered = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start]
        if not covered:
            # Spaces alone are in no token's offsets if those leave them out.
            reached = ((i, *whole(i)) for i in range(len(offsets)))
            covered = [i for i, a, b in reached if a < stop and b > start]
        if not covered:
            continue
        merged += whole(covered[0])[0] < start
        merged += whole(covered[-1])[1] > stop
        # Two spans may share a token, or touch.
        first = covered[0]
        if ranges and ranges[-1][1] >= first:
            first = ranges.pop()[0]
        ranges.append((first, covered[-1] + 1))
    return tuple(ranges), merged


def _with_spaces(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], tokenizer: Any, place: int
) -> tuple[int, int]:
    """A token's characters, with the spaces at its ends: some byte-level tokenizers trim their offsets."""
    start, stop = offsets[place]
    name: str = tokenizer.convert_ids_to_tokens(ids[place])
    bare, shown = name.lstrip(_SPACE), text[start:stop]
    before = len(name) - len(bare) - (len(shown) - len(shown.lstrip(" ")))
    while before > 0 and text[start - 1 : start] == " ":
        start, before = start - 1, before - 1
    after = len(bare) - len(bare.rstrip(_SPACE)) - (len(shown) - len(shown.rstrip(" ")))
    while after > 0 and text[stop : stop + 1] == " ":
        stop, after = stop + 1, after - 1
    return start, stop


def _characters(side: Side, tokenizer: Any, origin: str) -> tuple[str, Ranges]:
    """The rendered text and the character ranges in it that count."""
    text = (side.text or "") if side.messages is None else render_chat(side.messages, tokenizer, origin)
    if side.target is not None:
        return text, (_target(side.target, side.messages or (), tokenizer, text, origin),)
    if side.count == ALL or (side.count is None and side.messages is None):
        return text, ((0, len(text)),)
    if side.messages is None:
        return text, (_within(side.count, text, 0, text, origin),)
    if isinstance(side.count, tuple):
        index = side.count[0]
        if index >= len(side.messages):
            raise PairsError(f"{origin}: characters of message {index} count, but there are {len(side.messages)}")
        start, stop = _written(side.messages, index, tokenizer, text, origin)
        content = side.messages[index].content
        low, high = _within(side.count[1:], content, 0, content, origin)
        # A template that trims has moved what follows.
        lost = len(content.rstrip()) - len(text[start:stop].rstrip())
        low, high = max(low - lost, 0) + start, min(high - lost + start, stop)
        if low >= high:
            raise PairsError(f"{origin}: the chat template leaves out the counted characters {side.count[1:]}")
        return text, ((low, high),)
    role = side.count or "assistant"
    mine = [i for i, message in enumerate(side.messages) if message.role == role]
    if not mine:
        raise PairsError(
            f"{origin}: no target is named and there is no assistant message to count"
            if side.count is None
            else f"{origin}: there is no message of role {role!r} to count"
        )
    wanted = mine[-1:] if side.count is None else mine
    return text, tuple(_written(side.messages, index, tokenizer, text, origin) for index in wanted)


def _target(target: str, messages: tuple[ChatMessage, ...], tokenizer: Any, text: str, origin: str) -> tuple[int, int]:
    """The last occurrence, so that an answer that repeats words of its question is found in the answer."""
    start = text.rfind(target)
    if start < 0:
        raise PairsError(f"{origin}: the span {target!r:.60} is not in the rendered text {text!r:.120}")
    holders = [i for i, message in enumerate(messages) if target in message.content]
    if messages and not holders:
        return _across(target, messages, tokenizer, text, origin)
    if not holders or text.count(target) == sum(messages[i].content.count(target) for i in holders):
        return start, start + len(target)
    # The template's own markup, such as an end of turn, holds it too, or leaves one out: the message is to be found.
    try:
        low, high = _written(messages, holders[-1], tokenizer, text, origin)
    except PairsError:
        low, high = 0, 0
    start = text.rfind(target, low, high)
    if start < 0:
        raise PairsError(
            f"{origin}: the target {target!r:.60} is ambiguous after the chat template was applied; use a longer target"
        )
    return start, start + len(target)


def _across(target: str, messages: tuple[ChatMessage, ...], tokenizer: Any, text: str, origin: str) -> tuple[int, int]:
    """The last occurrence of what no message holds alone, such as an answer with the sign of its end.

    A role's name or a default system prompt is the template's alone, and not what was meant.
    """
    written = []
    for index in range(len(messages)):
        try:
            written.append(_written(messages, index, tokenizer, text, origin))
        except PairsError:
            continue
    start = text.rfind(target)
    while start >= 0:
        if any(start < high and start + len(target) > low for low, high in written):
            return start, start + len(target)
        start = text.rfind(target, 0, start + len(target) - 1)
    raise PairsError(f"{origin}: the span {target!r:.60} is in no message, only in what the chat template adds")


def _within(count: Any, text: str, start: int, shown: str, origin: str) -> tuple[int, int]:
    if not isinstance(count, tuple):
        raise PairsError(f"{origin}: {count!r:.40} counts messages of a chat, but this side is plain text")
    low, high = count
    if not 0 <= low < high <= len(text):
        raise PairsError(f"{origin}: characters {low} to {high} of {shown!r:.60}, which has {len(text)}")
    return start + low, start + high


def _written(messages: tuple[ChatMessage, ...], index: int, tokenizer: Any, text: str, origin: str) -> tuple[int, int]:
    """Character range of a message's content in the rendered text.

    Found by rendering the chat once more with a marker in its place: the words of the answer may
    stand elsewhere too, in a question or in the template's own markup.
    """
    answer = messages[index]
    marked_answer = answer.model_copy(update={"content": _MARKER})
    marked = render_chat((*messages[:index], marked_answer, *messages[index + 1 :]), tokenizer, origin)
    before, marker, after = marked.partition(_MARKER)
    found = text[len(before) : len(text) - len(after)]
    exact = marker and f"{before}{found}{after}" == text
    # Many templates trim what they write, and some leave out what was thought before an answer.
    mine = answer.content == found or answer.content.strip().endswith(found.strip() or found)
    if not exact or not found or not mine:
        raise PairsError(
            f"{origin}: the chat template does not write the message {answer.content!r:.60} as it stands, "
            "so its place is unsure; name what counts by target_1 and target_2"
        )
    return len(before), len(before) + len(found)


def render_chat(messages: tuple[ChatMessage, ...], tokenizer: Any, origin: str) -> str:
    """The chat as text: by the model's template, or, for a model without one, as lines `Role: content`."""
    if not tokenizer.chat_template:
        # The form of arXiv 2509.09660, which counts what follows `Assistant:`.
        return "\n".join(f"{message.role.capitalize()}: {message.content}" for message in messages)
    # A dependency of transformers, needed only where chats are rendered.
    from jinja2 import TemplateError

    chat = [message.model_dump() for message in messages]
    try:
        text: str = tokenizer.apply_chat_template(chat, tokenize=False)
    # A template that takes other contents than text fails in Python.
    except (TemplateError, TypeError, ValueError) as error:
        raise PairsError(
            f"{origin}: the model's chat template refuses the roles {[message.role for message in messages]}: {error}"
        ) from None
    return text
