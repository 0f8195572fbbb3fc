"""The grammar of steering requests: every form of the module's docstring, and what is no request."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expert_registry.errors import ProfileError, RequestError, SteerMoEError
from tests.support.refusals import not_refused
from vllm_steermoe_plugin.steering.profile import MAX_TEXT, PHASES, SteeringProfile
from vllm_steermoe_plugin.steering.request import MAX_PARTS, Named, SteeringRequest, parse_request

LONGEST_MESSAGE = 2000
"""A server writes a refusal to its log and sends it back."""


def spell(part: Named, order: list[int]) -> str:
    """A text that asks for `part`, its options in some order."""
    options = [
        "reverse" if part.reverse else "forward",
        "" if part.activate is None else f"activate={part.activate}",
        "" if part.deactivate is None else f"deactivate={part.deactivate}",
        f"phase={part.phase}",
    ]
    head = part.behaviour + ("" if part.version is None else f"@{part.version}")
    return ":".join([head, *(options[i] for i in order if options[i])])


@st.composite
def spelled(draw: st.DrawFn) -> tuple[str, Named]:
    """A text of one behaviour and what it means."""
    number = st.none() | st.integers(0, 999_999)
    part = Named(
        behaviour=draw(st.sampled_from("ab")) + draw(st.text("az09_-", max_size=20)),
        version=draw(st.none() | st.integers(1, 999_999)),
        reverse=draw(st.booleans()),
        activate=draw(number),
        deactivate=draw(number),
        phase=draw(st.sampled_from(PHASES)),
    )
    return spell(part, draw(st.permutations(range(4)))), part


@given(
    st.lists(spelled(), min_size=1, max_size=MAX_PARTS, unique_by=lambda pair: pair[1].behaviour),
    st.sampled_from(["", " "]),
)
@settings(max_examples=50, deadline=None)
def test_what_is_spelled_out_is_what_is_read(parts: list[tuple[str, Named]], space: str) -> None:
    text = space + f"{space}+{space}".join(text for text, _ in parts) + space
    assert parse_request(text) == SteeringRequest(named=tuple(part for _, part in parts))


def test_the_forms_of_the_docstring() -> None:
    for text, named in [
        ("faithfulness", [Named("faithfulness")]),
        ("faithfulness@2", [Named("faithfulness", version=2)]),
        ("faithfulness@latest", [Named("faithfulness")]),
        ("faithfulness:reverse", [Named("faithfulness", reverse=True)]),
        ("faithfulness:forward", [Named("faithfulness")]),
        (
            "faithfulness:activate=4:deactivate=0:phase=generation",
            [Named("faithfulness", activate=4, deactivate=0, phase="generation")],
        ),
        ("faithfulness+digits", [Named("faithfulness"), Named("digits")]),
        ("faithfulness@3:reverse + digits:activate=1", [Named("faithfulness", 3, True), Named("digits", activate=1)]),
        ("none", []),
        ("  none\n", []),
    ]:
        request = parse_request(text)
        assert request == SteeringRequest(named=tuple(named))
        assert bool(request) == bool(named)


def test_loaded_profiles_are_named_with_an_at() -> None:
    for text, named, profiles in [
        ("@terse", [], ["terse"]),
        (" @terse + @house-2 ", [], ["terse", "house-2"]),
        ("@terse+digits@2:reverse", [Named("digits", 2, True)], ["terse"]),
        ("digits+@digits", [Named("digits")], ["digits"]),
    ]:
        request = parse_request(text)
        assert request == SteeringRequest(named=tuple(named), profiles=tuple(profiles)) and bool(request)


def test_an_explicit_set_is_the_profile_that_its_json_says() -> None:
    text = ' {"activate": {"3": [5, 7]}, "phase": "prompt"} '
    request = parse_request(text)
    assert request.explicit == SteeringProfile(frozenset({(3, 5), (3, 7)}), phase="prompt")
    assert request.named == () and bool(request)


def test_an_explicit_set_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ProfileError, match="layer 3, expert 5"):
        parse_request('{"activate": {"3": [5]}, "deactivate": {"3": [5]}}')


def test_what_is_no_text_is_refused_by_its_type() -> None:
    for value in [None, 3, True, 2.5, ["digits"], {"activate": {"3": [5]}}, b"digits"]:
        with pytest.raises(RequestError, match=type(value).__name__):
            parse_request(value)


def test_what_is_no_request_is_refused_by_name() -> None:
    rows: list[tuple[Any, ...]] = [
        ("", "no steering request"),
        ("   ", "no steering request"),
        ("Faithfulness", "Faithfulness"),
        ("faith fulness", "faith fulness"),
        ("faithfulness,digits", "faithfulness,digits"),
        ("+digits", "no steering request"),
        ("digits+", "no steering request"),
        ("digits++faithfulness", "no steering request"),
        ("digits@", "digits@"),
        ("digits@0", "digits@0"),
        ("digits@-1", "digits@-1"),
        ("digits@newest", "digits@newest"),
        ("digits@1234567", "digits@1234567"),
        ("digits@٣", "no steering request"),
        ("2digits", "2digits"),
        ("d" * 65, "no steering request"),
        ("[1]", "no steering request"),
        ("digits:", "option"),
        ("digits::reverse", "option"),
        ("digits:revers", "reverse"),
        ("digits:Reverse", "Reverse"),
        ("digits:boost=3", "boost"),
        ("digits:activate", "activate"),
        ("digits:activate=", "activate"),
        ("digits:activate=-1", "'-1'"),
        ("digits:activate=1.5", "'1.5'"),
        ("digits:activate=04", "'04'"),
        ("digits:activate=٤", "activate"),
        ("digits:activate=1=2", "'1=2'"),
        ("digits:deactivate=1234567", "'1234567'"),
        ("digits:phase=all", "'all'"),
        ("digits:phase", "phase"),
        ("digits:reverse:forward", "twice"),
        ("digits:reverse:reverse", "twice"),
        ("digits:activate=1:activate=1", "'activate' stands twice"),
        ("digits+digits", "'digits' stands twice"),
        ("@digits+@digits", "'@digits' stands twice"),
        ("@", "write @NAME"),
        ("@ terse", "write @NAME"),
        ("@@terse", "write @NAME"),
        ("@terse@2", "write @NAME"),
        ("@Terse", "write @NAME"),
        ("@" + "t" * 65, "write @NAME"),
        ("@terse:reverse", "without options"),
        ("@terse:", "without options"),
        ("@terse,@house", "write @NAME"),
        ("digits@1+digits@2", "'digits' stands twice"),
        ("+".join(f"d{i}" for i in range(MAX_PARTS + 1)), f"at most {MAX_PARTS}"),
        ("digits" + " " * MAX_TEXT, str(MAX_TEXT)),
    ]
    assert not_refused(parse_request, rows, RequestError) == []


def test_a_direction_that_the_grammar_does_not_know_is_refused_rather_than_ignored() -> None:
    for option in ["direction=reverse", "direction=forward", "direction", "direction="]:
        with pytest.raises(RequestError, match="direction"):
            parse_request(f"digits:{option}")


def test_a_hint_never_suggests_what_was_written() -> None:
    with pytest.raises(RequestError) as caught:
        parse_request("digits:reverse=yes")
    assert "unknown steering option 'reverse'" not in str(caught.value)


def test_a_line_break_inside_a_behaviour_is_refused() -> None:
    for text in ["digits\n:reverse", "digits@2\n:reverse", "digits:activate=4\n:reverse"]:
        with pytest.raises(RequestError):
            parse_request(text)


def test_none_goes_together_with_nothing() -> None:
    for text in ["none:reverse", "none+digits", "none@1", "digits+none"]:
        with pytest.raises(RequestError, match="none"):
            parse_request(text)


def test_a_refusal_is_short_however_long_the_request() -> None:
    for text in [
        "x" * 500_000,
        "digits:" + "x" * 500_000,
        "digits:phase=" + "x" * 500_000,
        "digits:activate=" + "9" * 500_000,
        "digits" + " " * 500_000 + "+digits",
        '{"' + "x" * 500_000 + '": 1}',
        '{"phase": "' + "x" * 500_000 + '"}',
        '{"activate": {"' + "x" * 500_000 + '": [1]}}',
        '{"activate": {"1": ["' + "x" * 500_000 + '"]}}',
    ]:
        with pytest.raises(RequestError) as caught:
            parse_request(text)
        assert len(str(caught.value)) < LONGEST_MESSAGE


PIECES = [
    "digits",
    "@terse",
    "none",
    "@",
    "2",
    "latest",
    ":",
    "reverse",
    "forward",
    "activate=",
    "phase=",
    "both",
    "+",
    " ",
    "\n",
    "=",
]
PIECES += [
    '{"activate":',
    '"deactivate":',
    '{"3":',
    "[5]",
    "}}",
    "}",
    "null",
    "1e999",
    "9" * 5000,
    "\ud800",
    "\0",
    "direction",
]


@given(st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@example('{"activate":{"3":[' + "9" * 5000 + "]}}")
@settings(max_examples=400, deadline=None)
def test_any_text_is_a_request_or_an_error_of_ours(text: str) -> None:
    try:
        request = parse_request(text)
    except SteerMoEError:
        return
    assert isinstance(request, SteeringRequest)
    assert not (request.named and request.explicit)
    assert bool(request) == (text.strip() != "none")
