"""Texts coloured by their tokens' experts."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from expert_registry import RankedExpert, Ranking, write_ranking
from expert_registry.errors import ConfigurationError, ProfileError
from tests.support.oracle import ReferenceModel
from tests.support.planted import planted_ranking
from vllm_steermoe_plugin.cli import app
from vllm_steermoe_plugin.detection.attribution import AttributedToken, _joined, _pieces, attribute
from vllm_steermoe_plugin.detection.pairs import ChatMessage, PairsError
from vllm_steermoe_plugin.models import lab_checkpoint
from vllm_steermoe_plugin.views.attribution import attribution_html, attribution_text

TEXT = "Count from 2 to 4. 2 3 4 <b>two</b> & three four"


@pytest.fixture
def engine(lab: Any) -> Any:
    """Eight groups: longer texts take several passes."""
    return lab


@pytest.mark.parametrize("top", [None, 4])
def test_scores_equal_the_slow_reference(engine: Any, top: int | None) -> None:
    ranking = planted_ranking("digits")
    tokens = attribute(engine, ranking, TEXT, top)
    ids = engine.get_tokenizer()(TEXT)["input_ids"]
    assert len(ids) == len(tokens) > 16, "more than two passes"
    _, chosen = ReferenceModel(lab_checkpoint.MODEL_DIR).run(ids, {})
    differences = {(e.layer, e.expert): e.risk_difference for e in ranking.experts()[:top]}
    for position, token in enumerate(tokens):
        mine = [differences.get((layer, e), 0.0) for layer in chosen for e in chosen[layer][position]]
        assert token.score == pytest.approx(sum(mine) / len(chosen))
        assert len(token.experts) == min(3, sum(value != 0 for value in mine))
    assert "".join(token.text for token in tokens) == TEXT


def test_a_chat_is_rendered_by_its_template(engine: Any) -> None:
    chat = [ChatMessage(role="user", content="Count from 2 to 4."), ChatMessage(role="assistant", content="2 3 4")]
    tokens = attribute(engine, planted_ranking("digits"), chat)
    written = engine.get_tokenizer().apply_chat_template([m.model_dump() for m in chat], tokenize=False)
    assert "".join(token.text for token in tokens) == written


def test_what_cannot_be_attributed_is_refused(engine: Any, engines: Callable[..., Any], checkpoint: Any) -> None:
    ranking = planted_ranking("digits")
    with pytest.raises(PairsError, match="0 tokens"):
        attribute(engine, ranking, "")
    with pytest.raises(PairsError, match="the context holds"):
        attribute(engine, ranking, "one " * 2000)
    card = ranking.card.model_copy(update={"top_k": 1})
    with pytest.raises(ProfileError, match=r"the ranking is of .* but the engine runs"):
        attribute(engine, Ranking(ranking.counts, card), TEXT)


def test_the_page_shows_the_text_and_escapes_it() -> None:
    tokens = [
        AttributedToken("<script>", 0.5, planted_ranking("digits").experts()[:1]),  # type: ignore[arg-type]
        AttributedToken('" onx="', -0.25, ()),
        AttributedToken("", 9.0, ()),
        AttributedToken("\n{x}", 0.0, ()),
    ]
    page = attribution_html(tokens, planted_ranking("digits"))
    body = page[page.index("<pre>") + 5 : page.index("</pre>")]
    assert "<script" not in body and html.unescape(re.sub(r"<[^>]*>", "", body)) == '<script>" onx="\n{x}'
    assert body.count("<span") == 3 and "rgba(178, 24, 43" in body and "rgba(33, 102, 172" in body
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(attribution_text(tokens))
    assert console.export_text().startswith('<script>" onx="')


def test_a_text_cannot_steer_the_terminal() -> None:
    tokens = [AttributedToken("a\x1b[31m\x07\r", 0.5, ()), AttributedToken("\n\tb\x7f\x9b", -0.5, ())]
    assert attribution_text(tokens).plain == "a\u241b[31m\u2407\u240d\n\tb\u2421\ufffd"


def test_tokens_that_share_a_character_are_shown_as_one() -> None:
    fox = "a\U0001f98ab"
    offsets = [(0, 0), (0, 1), (1, 2), (1, 2), (1, 2), (1, 2), (2, 3)]
    pieces = [("", slice(0, 1)), ("a", slice(1, 2)), (fox[1], slice(2, 6)), ("b", slice(6, 7))]
    assert _pieces(fox, offsets) == pieces
    assert _pieces("a  b", [(0, 1), (3, 4)]) == [("a", slice(0, 1)), ("  b", slice(1, 2))]
    one, two, other = (RankedExpert(0, number, difference) for number, difference in ((1, 0.5), (2, -0.7), (3, 0.1)))
    assert _joined([(0.25, (one, other)), (0.75, (two, one))]) == (0.5, (two, one, other))


def test_colours_go_by_what_is_seen() -> None:
    tokens = [AttributedToken("", 9.0, ()), AttributedToken("yes", 0.5, ()), AttributedToken("no", -0.5, ())]
    assert attribution_html(tokens, planted_ranking("digits")).count(", 1.00); color: #fff") == 2


def test_a_text_cannot_reorder_the_page() -> None:
    page = attribution_html([AttributedToken("\u202eabc\u2066\0\x1b", 0.5, ())], planted_ranking("digits"))
    assert "\ufffdabc\ufffd\u2400\u241b" in page and "unicode-bidi: isolate" in page


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("rankings")
    paths = folder / "digits.safetensors", folder / "refusal.safetensors"
    for path in paths:
        write_ranking(planted_ranking(path.stem), path)
    return paths


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("plot", "{}", "--kind", "pie"), "unknown kind of figure 'pie'"),
        (("plot", "{}", "--out", "x.gif"), "must end in .png"),
        (("plot", "{}", "--out", "{}/x.png"), "cannot write"),
        (("attribute", "{}"), "give one of --text"),
        (("attribute", "{}", "--text", "a", "--answer", "b"), "--answer goes with --prompt"),
        (("attribute", "{}", "--file", "none.txt"), "cannot read none.txt"),
        (("attribute", "{}", "--text", "a", "--engine-args", "["), "not JSON"),
        (("attribute", "{}", "--text", "a\udcff"), "--text is not UTF-8"),
        (("attribute", "{}", "--text", "a", "--html", "{}/x"), "cannot write"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[str, ...], reason: str, files: tuple[Path, Path]) -> None:
    done = run(*(argument.format(files[0]) for argument in arguments))
    assert reason in str(done.exception)


def test_an_engine_that_does_not_count_cannot_attribute(engines: Callable[..., Any]) -> None:
    plain = engines(lab_checkpoint.NAME, {"count_groups": 0}, enable_prefix_caching=False, dtype="float32")
    with pytest.raises(ConfigurationError, match="does not count; start it"):
        attribute(plain, planted_ranking("digits"), TEXT)
