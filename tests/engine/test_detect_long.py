"""Detection over many chunks: by example, resumed after a kill, stopped early, with bad pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from expert_registry import cautions, standard_errors
from expert_registry.errors import EngineError, UsageError
from tests.support.few_pairs import BEHAVIOUR, few, same
from tests.support.oracle import ReferenceModel
from vllm_steermoe_plugin.detection import pair_counting as module
from vllm_steermoe_plugin.detection.detect import detect
from vllm_steermoe_plugin.detection.engine_client import take_counts
from vllm_steermoe_plugin.detection.loop import DetectionOptions
from vllm_steermoe_plugin.detection.pairs import PairsError, PairSet, read_pairs
from vllm_steermoe_plugin.detection.progress_file import ResumeError
from vllm_steermoe_plugin.detection.token_spans import encode_side
from vllm_steermoe_plugin.models import lab_checkpoint

GROUPS = 8


@pytest.fixture
def engine(lab: Any) -> Any:
    """Eight groups, so that a chunk is four pairs."""
    return lab


def test_the_summary_equals_the_slow_reference_pair_by_pair(engine: Any) -> None:
    pairs = few("refusal", 6)
    ranking = detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=DetectionOptions(permutations=9))
    reference, tokenizer = ReferenceModel(lab_checkpoint.MODEL_DIR), engine.get_tokenizer()
    shape = ranking.shape
    selections = np.zeros((6, 2, len(shape.layers), shape.num_experts), dtype=np.int64)
    tokens = np.zeros((6, 2), dtype=np.int64)
    for number, pair in enumerate(pairs.pairs):
        for index, side in enumerate((pair.side_1, pair.side_2)):
            span = encode_side(side, tokenizer, pair.origin)
            _, chosen = reference.run(list(span.token_ids), {})
            tokens[number, index] = span.stop - span.start
            for row, layer in enumerate(shape.layers):
                for experts in chosen[layer][span.start : span.stop]:
                    selections[number, index, row, experts] += 1
    assert ranking.clusters is not None and ranking.clusters.examples.tolist() == [6]
    one, two = selections[:, 0], selections[:, 1]
    np.testing.assert_array_equal(ranking.clusters.squares_1, (one**2).sum(axis=0))
    np.testing.assert_array_equal(ranking.clusters.products, (one * two).sum(axis=0))
    np.testing.assert_array_equal(ranking.clusters.with_other_2, (two * tokens[:, :1, None]).sum(axis=0))
    assert ranking.clusters.token_products.tolist() == [
        int(tokens[:, 0] @ tokens[:, 0]), int(tokens[:, 1] @ tokens[:, 1]), int(tokens[:, 0] @ tokens[:, 1])
    ]  # fmt: skip
    assert any("only 6 clusters" in text for text in cautions(ranking.counts, ranking.clusters))
    assert np.isfinite(standard_errors(ranking.counts, ranking.clusters)).all()


def interrupt_at(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> list[int]:
    """Taking the counts is interrupted at the calls of these numbers, from 1 on; the numbers of the calls so far."""
    take, calls = module.take_counts, list[int]()

    def interrupted(*given: Any) -> Any:
        calls.append(len(calls) + 1)
        if calls[-1] in numbers:
            raise KeyboardInterrupt
        return take(*given)

    monkeypatch.setattr(module, "take_counts", interrupted)
    return calls


def test_a_killed_detection_goes_on_and_counts_nothing_twice(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = few("digits", 22)
    plain = DetectionOptions(permutations=20)
    whole = detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=plain)
    kept = tmp_path / "progress"
    said: list[str] = []
    options = replace(plain, checkpoint=kept, checkpoint_every=0.0, report=said.append)
    calls = interrupt_at(monkeypatch, 3, 5)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=options)
        assert kept.exists()
    with pytest.raises(ResumeError, match="other pairs or other options; remove it"):
        detect(engine, lab_checkpoint.NAME, few("digits", 21), BEHAVIOUR, options=options)
    read_otherwise = tuple(replace(pair, side_1=replace(pair.side_1, count="all")) for pair in pairs.pairs)
    with pytest.raises(ResumeError, match="other pairs or other options"):
        detect(engine, lab_checkpoint.NAME, replace(pairs, pairs=read_otherwise), BEHAVIOUR, options=options)
    resumed = detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=options)
    same(whole, resumed)
    # Each kill loses the one chunk of 4 that was being counted: two of three, and then one of two, are kept.
    assert len(said) == 2 and "8 of 22 pairs are counted" in said[0] and "12 of 22 pairs are counted" in said[1]
    # 22 pairs in chunks of 4 are 6 chunks, and two were counted again.
    assert len(calls) == 8
    # Until its ranking is safe, what a detection has counted stays.
    same(whole, detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=options))
    assert "22 of 22 pairs are counted" in said[2]


def test_pairs_of_a_cluster_are_one_example_in_any_chunk_and_after_a_kill(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = few("digits", 17)
    # Scattered: 4 clusters of 3 to 5 pairs, some longer than a chunk of 4; the first pair of one cannot be counted.
    scattered = tuple(replace(pair, cluster=f"c{i * i % 7}") for i, pair in enumerate(pairs.pairs))
    bad = replace(scattered[1], side_2=replace(scattered[1].side_2, target="not there"))
    clustered = replace(pairs, pairs=(scattered[0], bad, *scattered[2:]))
    plain = DetectionOptions(permutations=20, skip_bad=True)
    options = replace(plain, checkpoint=tmp_path / "progress", checkpoint_every=0.0)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 3, 5)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                detect(engine, lab_checkpoint.NAME, clustered, BEHAVIOUR, options=options)
        ranking = detect(engine, lab_checkpoint.NAME, clustered, BEHAVIOUR, options=options)
    same(ranking, detect(engine, lab_checkpoint.NAME, clustered, BEHAVIOUR, options=plain))
    counted = [pair for pair in scattered if pair is not scattered[1]]
    names = list(dict.fromkeys(pair.cluster for pair in scattered))
    assert ranking.clusters is not None and ranking.clusters.examples.tolist() == [len(names)] == [4]
    assert ranking.card.data.pairs == 16
    # Each cluster by itself, pair by pair, and their counts as one.
    squares = np.zeros_like(ranking.counts.activations_1)
    for name in names:
        mine = tuple(replace(pair, cluster=None) for pair in counted if pair.cluster == name)
        alone = detect(
            engine, lab_checkpoint.NAME, replace(pairs, pairs=mine), BEHAVIOUR, options=DetectionOptions(permutations=0)
        )
        squares += alone.counts.activations_1**2
    np.testing.assert_array_equal(ranking.clusters.squares_1, squares)
    unclustered = replace(pairs, pairs=tuple(replace(pair, cluster=None) for pair in counted))
    apart = detect(engine, lab_checkpoint.NAME, unclustered, BEHAVIOUR, options=plain)
    np.testing.assert_array_equal(apart.counts.activations_1, ranking.counts.activations_1)
    assert apart.clusters is not None and apart.clusters.examples.tolist() == [16]


def test_a_bad_pair_found_late_loses_nothing_that_was_counted(engine: Any, tmp_path: Path) -> None:
    pairs = few("digits", 14)
    bad = replace(pairs.pairs[9], side_2=replace(pairs.pairs[9].side_2, target="not there"))
    pairs = replace(pairs, pairs=(*pairs.pairs[:9], bad, *pairs.pairs[10:]))
    said: list[str] = []
    options = DetectionOptions(permutations=20, checkpoint=tmp_path / "progress", report=said.append)
    with pytest.raises(PairsError, match="not there"):
        detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=options)
    assert said == [f"8 pairs before it are counted and kept in {options.checkpoint}"]
    ranking = detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=replace(options, skip_bad=True))
    assert "8 of 14 pairs are counted" in said[1] and "1 bad pairs were skipped" in ranking.card.note
    plain = DetectionOptions(permutations=20, skip_bad=True)
    same(ranking, detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=plain))


def test_pairs_left_out_before_a_kill_are_not_forgotten(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = few("digits", 14)
    bad = replace(pairs.pairs[1], side_2=replace(pairs.pairs[1].side_2, target="not there"))
    pairs = replace(pairs, pairs=(pairs.pairs[0], bad, *pairs.pairs[2:]))
    options = DetectionOptions(checkpoint=tmp_path / "progress", checkpoint_every=0.0, skip_bad=True)
    interrupt_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=options)
    with pytest.raises(ResumeError, match="left out bad pairs; ask for that again"):
        detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=replace(options, skip_bad=False))
    assert detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=options).card.data.pairs == 13


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x08\0\0\0\0\0\0\0{}      "])
def test_damaged_progress_is_refused(engine: Any, tmp_path: Path, content: bytes) -> None:
    kept = tmp_path / "progress"
    kept.write_bytes(content)
    with pytest.raises(ResumeError, match="is not a file of progress"):
        detect(engine, lab_checkpoint.NAME, few("digits", 2), BEHAVIOUR, options=DetectionOptions(checkpoint=kept))


def test_a_stable_top_stops_early_and_the_card_says_so(engine: Any) -> None:
    pairs = few("digits", 60)
    ranking = detect(
        engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=DetectionOptions(permutations=0, stop_when_stable=1)
    )
    assert ranking.card.data.pairs < 60
    assert f"Stopped after {ranking.card.data.pairs} of 60 pairs" in ranking.card.note
    first = PairSet(pairs.name, pairs.sha256, pairs.pairs[: ranking.card.data.pairs])
    same(ranking, detect(engine, lab_checkpoint.NAME, first, BEHAVIOUR, options=DetectionOptions(permutations=0)))


def test_a_killed_run_stops_early_where_it_would_have_stopped(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = few("digits", 60)
    plain = DetectionOptions(permutations=0, stop_when_stable=1)
    whole = detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=plain)
    options = replace(plain, checkpoint=tmp_path / "progress", checkpoint_every=0.0)
    interrupt_at(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=options)
    resumed = detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=options)
    assert resumed.card.note == whole.card.note
    same(whole, resumed)


def test_bad_pairs_are_named_and_skipped_only_when_asked(engine: Any, tmp_path: Path) -> None:
    good = {"text_1": "2 3 4", "text_2": "two three four"}
    lines = [
        json.dumps(good),
        "{",
        json.dumps({"text_1": "one " * 2000, "text_2": "two"}),
        json.dumps(good | {"target_2": "five"}),
        json.dumps(good | {"text_1": ""}),
        json.dumps({"text_1": "5 6", "text_2": "five six"}),
        json.dumps({"text_1": "2 3 4", "text_2": "2 3 4"}),
        json.dumps({"text_1": "2 3 4", "text_2": "2 three", "target_1": "2", "target_2": "2"}),
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(PairsError, match="line 2"):
        read_pairs(path)
    pairs = read_pairs(path, skip_bad=True)
    with pytest.raises(PairsError, match=r"line 3, side 1: \d+ tokens, but the context"):
        detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR)
    said: list[str] = []
    options = DetectionOptions(skip_bad=True, report=said.append, permutations=5)
    ranking = detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=options)
    assert [text.split(":")[1].strip() for text in said] == [
        "pairs.jsonl, line 3, side 1", "pairs.jsonl, line 4, side 2", "pairs.jsonl, line 5, side 1",
        "pairs.jsonl, line 7", "pairs.jsonl, line 8",
    ]  # fmt: skip
    assert ranking.card.data.pairs == 2 and "6 bad pairs were skipped" in ranking.card.note
    with pytest.raises(PairsError, match=r"line 7: nothing in what counts, or before it, differs"):
        detect(engine, lab_checkpoint.NAME, replace(pairs, pairs=pairs.pairs[-2:-1]), BEHAVIOUR)
    path.write_text("\n".join([json.dumps(good), lines[5]]))
    both = detect(engine, lab_checkpoint.NAME, read_pairs(path), BEHAVIOUR)
    np.testing.assert_array_equal(both.counts.activations_1, ranking.counts.activations_1)
    path.write_text(lines[3])
    with pytest.raises(PairsError, match=r"no pair is left to count; .*line 1, side 2"):
        detect(engine, lab_checkpoint.NAME, read_pairs(path), BEHAVIOUR, options=options)


def test_balanced_sides_count_as_many_tokens(engine: Any) -> None:
    pairs = few("refusal", 8)
    plain = detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR)
    even = detect(engine, lab_checkpoint.NAME, pairs, BEHAVIOUR, options=DetectionOptions(balance=True))
    assert plain.counts.tokens[0] != plain.counts.tokens[1]
    assert even.counts.tokens[0] == even.counts.tokens[1] <= plain.counts.tokens.min()
    assert "as the shorter has" in even.card.span


def test_every_part_that_may_count_is_counted(engine: Any, tmp_path: Path) -> None:
    """Spans by role come in pieces; the counts say how many tokens they have."""
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Count from 2 to 4."},
        {"role": "assistant", "content": "2 3 4"},
        {"role": "user", "content": "Count from 3 to 4."},
        {"role": "assistant", "content": "3 4"},
    ]
    tokens = {}
    for count in (None, "assistant", "user", "all", [2, 0, 1]):
        path = tmp_path / "pairs.jsonl"
        path.write_text(json.dumps({"messages_1": messages, "messages_2": messages[1:], "count_1": count}))
        tokens[str(count)] = int(detect(engine, lab_checkpoint.NAME, read_pairs(path), BEHAVIOUR).counts.tokens[0])
    assert 0 < tokens["None"] < tokens["assistant"] < tokens["all"] and tokens["[2, 0, 1]"] == 1
    assert tokens["assistant"] + tokens["user"] < tokens["all"], "the template's own tokens"


def test_a_model_without_a_chat_template_reads_lines(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.get_tokenizer(), "chat_template", None)
    ranking = detect(engine, lab_checkpoint.NAME, few("digits", 3), BEHAVIOUR)
    assert "no chat template" in ranking.card.note


def test_a_tokenizer_without_offsets_is_refused(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        chat_template = None

        def __call__(self, text: Any, return_offsets_mapping: bool = False) -> dict[str, Any]:
            raise NotImplementedError("no offsets")

    class Other:
        def __call__(self, text: Any) -> dict[str, Any]:
            return {"input_ids": [[1]]}

    for kind in (Slow, Other):
        monkeypatch.setattr(engine, "get_tokenizer", kind)
        with pytest.raises(EngineError, match=f"{kind.__name__} does not say which characters.*tokenizer_mode='hf'"):
            detect(engine, lab_checkpoint.NAME, few("digits", 3), BEHAVIOUR)


def test_an_engine_without_a_tokenizer_is_refused(engines: Callable[..., Any], checkpoint: Any) -> None:
    bare = engines(str(checkpoint("OlmoeForCausalLM")), {"count_groups": 2})
    with pytest.raises(EngineError, match="cannot be read without a tokenizer"):
        detect(bare, "some/model", few("digits", 3), BEHAVIOUR)


def test_the_card_says_what_the_counts_depend_on(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine.llm_engine.vllm_config.model_config.hf_config
    monkeypatch.setattr(config, "_commit_hash", "0123abcd", raising=False)
    pairs = few("digits", 3).first(2)
    card = detect(engine, "some/model", pairs, BEHAVIOUR, options=DetectionOptions(seed=5, permutations=3)).card
    assert card.model.revision == "0123abcd" and card.data.name.endswith("first 2 of 3")
    assert "Counted in float32; halves and permutations by seed 5." in card.note
    with pytest.raises(UsageError, match="cannot hold behaviour 'No Name'"):
        detect(engine, "some/model", pairs, replace(BEHAVIOUR, name="No Name"))


def test_an_engine_that_does_not_count_is_told_how(engines: Callable[..., Any]) -> None:
    plain = engines(lab_checkpoint.NAME, {"count_groups": 1}, enable_prefix_caching=False, dtype="float32")
    with pytest.raises(EngineError, match="counts 1 groups; start it with the setting 'count_groups' at 256"):
        detect(plain, lab_checkpoint.NAME, few("digits", 3), BEHAVIOUR)


def test_a_model_that_is_no_mixture_is_named() -> None:
    dense_config = SimpleNamespace(architectures=["LlamaForCausalLM"], num_hidden_layers=2)
    config = SimpleNamespace(hf_config=dense_config, architecture="LlamaForCausalLM")
    dense: Any = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(model_config=config)))
    with pytest.raises(EngineError, match="cannot be steered: LlamaForCausalLM is not known"):
        detect(dense, "some/model", few("digits", 1), BEHAVIOUR)


def test_a_layer_without_routed_experts_is_named() -> None:
    part = {"layers": [0, 2], "shape": [1, 2, 4], "selections": np.zeros((1, 2, 4), "<i4").tobytes(), "tokens": [0]}
    workers: Any = SimpleNamespace(collective_rpc=lambda method: [part])
    selections, tokens = take_counts(workers, (0, 2))
    assert selections.shape == (1, 2, 4) and tokens.tolist() == [0]
    with pytest.raises(EngineError, match=r"no worker counted layers \[1\]: they have no routed experts"):
        take_counts(workers, (0, 1, 2))
    other = part | {"tokens": [1]}
    workers.collective_rpc = lambda method: [part, other]
    with pytest.raises(EngineError, match="different numbers of tokens"):
        take_counts(workers, (0, 2))


def test_two_halves_of_the_layers_are_put_together() -> None:
    """As pipeline stages give them."""
    parts = [
        {
            "layers": [layer],
            "shape": [2, 1, 4],
            "selections": np.full((2, 1, 4), layer, "<i4").tobytes(),
            "tokens": [1, 2],
        }
        for layer in (3, 0)
    ]
    selections, _ = take_counts(cast("Any", SimpleNamespace(collective_rpc=lambda method: parts)), (0, 3))
    assert selections[:, 0].max() == 0 and (selections[:, 1] == 3).all()
