"""The grammar of steering requests: every form of the module's docstring, and what is no request."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expert_registry.errors import ProfileError, RequestError, SteerMoEError
from expert_registry.weights import SCORES
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
    if part.strength is not None:
        options[:3] = [f"strength={part.strength}", part.top and f"top={part.top}", part.by and f"by={part.by}"]
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
    if draw(st.booleans()):
        part = Named(
            part.behaviour,
            part.version,
            phase=part.phase,
            strength=draw(st.integers(-1600, 1600)) / 100,
            top=draw(st.none() | st.integers(1, 999_999)),
            by=draw(st.none() | st.sampled_from(SCORES)),
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
    plain = Named("faithfulness")
    numbers = Named("faithfulness", activate=4, deactivate=0, phase="generation")
    by_log_ratio = Named("faithfulness", strength=1.0, top=200, by="log_ratio")
    several = (Named("faithfulness", 3, True), Named("digits", activate=1))
    for text, named, profiles in (
        ("faithfulness", (plain,), ()),
        ("faithfulness@2", (Named("faithfulness", version=2),), ()),
        ("faithfulness@latest", (plain,), ()),
        ("faithfulness:reverse", (Named("faithfulness", reverse=True),), ()),
        ("faithfulness:forward", (plain,), ()),
        ("faithfulness:strength=0.5", (Named("faithfulness", strength=0.5),), ()),
        ("faithfulness:strength=-.5", (Named("faithfulness", strength=-0.5),), ()),
        ("faithfulness:strength=-0", (Named("faithfulness", strength=0.0),), ()),
        ("faithfulness:by=log_ratio:top=200:strength=1", (by_log_ratio,), ()),
        ("faithfulness:activate=4:deactivate=0:phase=generation", (numbers,), ()),
        ("faithfulness+digits", (plain, Named("digits")), ()),
        ("faithfulness@3:reverse + digits:activate=1", several, ()),
        ("none", (), ()),
        ("  none\n", (), ()),
        ("@terse", (), ("terse",)),
        (" @terse + @house-2 ", (), ("terse", "house-2")),
        ("@terse+digits@2:reverse", (Named("digits", 2, True),), ("terse",)),
        ("digits+@digits", (Named("digits"),), ("digits",)),
    ):
        request = parse_request(text)
        assert request == SteeringRequest(named=named, profiles=profiles)
        assert bool(request) == bool(named or profiles)


def test_an_explicit_set_is_the_profile_that_its_json_says() -> None:
    text = ' {"activate": {"3": [5, 7]}, "phase": "prompt"} '
    request = parse_request(text)
    assert request.explicit == SteeringProfile(frozenset({(3, 5), (3, 7)}), phase="prompt")
    assert request.named == () and bool(request)


def test_biases_of_zero_ask_for_nothing_and_a_strength_has_one_text() -> None:
    assert parse_request('{"bias": {"3": {"5": 0, "6": -0.0, "7": 1e-9}}}') == SteeringRequest()
    assert parse_request('{"bias": {"3": {"5": 0.7}}}').explicit == SteeringProfile(bias=((3, 5, 0.7),))
    texts = {parse_request(f"digits:strength={x}").text() for x in ("0.50", ".5", "00.5", "0.5")}
    assert texts == {"digits:strength=0.5"}
    assert parse_request("digits:strength=-0").text() == "digits:strength=0"
    for text in ("digits:strength=0.000001", "digits:strength=-10", "digits:strength=16", "digits:strength=12.345678"):
        assert parse_request(text).text() == text
    away = [parse_request(f"digits:{option}").named[0].away for option in ("strength=-0.1", "strength=0", "reverse")]
    assert away == [True, False, True]


def test_an_explicit_set_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ProfileError, match="layer 3, expert 5"):
        parse_request('{"activate": {"3": [5]}, "deactivate": {"3": [5]}}')


def test_what_is_no_request_is_refused_by_name() -> None:
    for value in (None, 3, True, 2.5, ["digits"], {"activate": {"3": [5]}}, b"digits"):
        with pytest.raises(RequestError, match=type(value).__name__):
            parse_request(value)
    many = "+".join(f"d{i}" for i in range(MAX_PARTS + 1))
    refused = {
        "no steering request": ("", "   ", "+digits", "digits+", "digits++faithfulness", "digits@٣", "d" * 65, "[1]"),
        "is no steering request": (
            *("Faithfulness", "faith fulness", "faithfulness,digits", "digits@", "digits@0", "digits@-1"),
            *("digits@newest", "digits@1234567", "2digits", "digits\n:reverse", "digits@2\n:reverse"),
        ),
        "unknown steering option": ("digits:", "digits::reverse", "digits:boost=3", "digits:activate", "digits:phase"),
        "did you mean 'reverse'": ("digits:revers", "digits:Reverse"),
        "option 'direction": tuple(f"digits:direction{end}" for end in ("=reverse", "=forward", "", "=")),
        "needs a number of experts": (
            *(f"digits:activate={number}" for number in ("", "-1", "1.5", "04", "٤", "1=2", "4\n:reverse")),
            "digits:deactivate=1234567",
        ),
        "unknown phase 'all'": ("digits:phase=all",),
        "needs a number such as": tuple(
            f"digits:strength={x}" for x in ("", "-", ".", "nan", "inf", "-inf", "1e1", "0x1", "0,5", "٣", "--1")
        ),
        "a strength is from -16 to 16": ("digits:strength=17", "digits:strength=-16.01", "digits:strength=99"),
        "say their strength": ("digits:top=200", "digits:by=sign", "digits:reverse:top=2"),
        "gives them biases in place": (
            *(f"digits:strength=1:{option}" for option in ("activate=4", "deactivate=0", "weight=own", "reverse")),
            "digits:forward:strength=-1",
        ),
        "top= needs a number of experts": tuple(f"digits:strength=1:top={x}" for x in ("0", "-1", "all", "1.5")),
        "unknown by 'effect'": ("digits:strength=1:by=effect",),
        "'strength' stands twice": ("digits:strength=1:strength=1",),
        "twice": ("digits:reverse:forward", "digits:reverse:reverse"),
        "'activate' stands twice": ("digits:activate=1:activate=1",),
        "'digits' stands twice": ("digits+digits", "digits@1+digits@2"),
        "'@digits' stands twice": ("@digits+@digits",),
        "write @NAME": ("@", "@ terse", "@@terse", "@terse@2", "@Terse", "@" + "t" * 65, "@terse,@house"),
        "without options": ("@terse:reverse", "@terse:"),
        "none": ("none:reverse", "none+digits", "none@1", "digits+none"),
        f"at most {MAX_PARTS}": (many,),
        str(MAX_TEXT): ("digits" + " " * MAX_TEXT,),
    }
    rows = [(text, words) for words, texts in refused.items() for text in texts]
    assert not_refused(parse_request, rows, RequestError) == []


def test_a_hint_never_suggests_what_was_written() -> None:
    with pytest.raises(RequestError) as caught:
        parse_request("digits:reverse=yes")
    assert "unknown steering option 'reverse'" not in str(caught.value)


def test_a_refusal_is_short_however_long_the_request() -> None:
    long = "x" * 500_000
    for text in (
        *(long, f"digits:{long}", f"digits:phase={long}", "digits:activate=" + "9" * 500_000),
        "digits" + " " * 500_000 + "+digits",
        *(f'{{"{long}": 1}}', f'{{"phase": "{long}"}}'),
        *(f'{{"activate": {{"{long}": [1]}}}}', f'{{"activate": {{"1": ["{long}"]}}}}'),
    ):
        with pytest.raises(RequestError) as caught:
            parse_request(text)
        assert len(str(caught.value)) < LONGEST_MESSAGE, text[:30]


PIECES = (
    *(
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
        "strength=",
        "top=",
        '"bias":',
        "both",
        "+",
        " ",
    ),
    *("\n", "=", '{"activate":', '"deactivate":', '{"3":', "[5]", "}}", "}", "null", "1e999", "9" * 5000, "\ud800"),
    *("\0", "direction"),
)


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
    assert bool(request) or "none" in text or "bias" in text
