"""The lab's world: splits, pairs and the judges of generated text. No torch needed."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from vllm_steermoe_plugin.lab import world
from vllm_steermoe_plugin.lab.training import planting

SIDES = (1, 2)


EACH = list(product(world.BEHAVIOURS, world.SPLITS))


def _all(behaviour: str, split: str) -> list[world.Example]:
    return world.examples(behaviour, split) + world.controls(behaviour, split)


def test_splits_share_no_prompt_and_hold_out_whole_combinations() -> None:
    for behaviour, (one, two) in product(world.BEHAVIOURS, combinations(world.SPLITS, 2)):
        assert not {e.prompt for e in _all(behaviour, one)} & {e.prompt for e in _all(behaviour, two)}
        parts = 4 if behaviour == "refusal" else 3  # the refusal holds out (item, template)
        keys = ({tuple(e.id.split("/")[:parts]) for e in world.examples(behaviour, split)} for split in (one, two))
        assert not set.intersection(*keys)


def test_ids_and_prompts_are_unique_and_examples_balanced() -> None:
    for behaviour, split in EACH:
        items = _all(behaviour, split)
        assert len({e.id for e in items}) == len({e.prompt for e in items}) == len(items)
        examples = world.examples(behaviour, split)
        assert examples == world.examples(behaviour, split)
        assert 0.4 <= sum(world.lean(e) > 0 for e in examples) / len(examples) <= 0.6


def test_sizes() -> None:
    for behaviour, split in EACH:
        least, controls = (150, 150) if split == "test" else (60, 40)
        assert len(world.examples(behaviour, split)) >= least and len(world.controls(behaviour, split)) >= controls


def test_shows_tells_the_sides_apart() -> None:
    for behaviour in world.BEHAVIOURS:
        for e in world.examples(behaviour, "test"):
            assert world.shows(behaviour, e, e.answer)
            assert world.shows(behaviour, e, f"  {e.answer.upper()} <|end|>")
            assert not world.shows(behaviour, e, e.other)
            assert not world.shows(behaviour, e, "")
            assert not world.shows(behaviour, e, f"<|end|> {e.answer}")


def test_correct_needs_the_whole_answer() -> None:
    for behaviour in world.BEHAVIOURS:
        for e in world.controls(behaviour, "test"):
            assert e.other == ""
            assert world.correct(e, f" {e.answer}<|end|>")
            assert not world.correct(e, f"{e.answer} more")
            assert not world.correct(e, "")


def test_shows_refuses_a_foreign_example() -> None:
    example = world.examples("digits", "test")[0]
    with pytest.raises(ValueError, match="belongs to digits"):
        world.shows("refusal", example, "")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown behaviour"):
        world.examples("colour", "test")
    with pytest.raises(ValueError, match="unknown split"):
        world.examples("digits", "validation")


def test_pairs_differ_in_cue_and_answer_only() -> None:
    for behaviour in world.BEHAVIOURS:
        known = {e.prompt: e for e in world.examples(behaviour, "detection")}
        drawn = world.pairs(behaviour)
        assert len(drawn) == len(known)
        for pair in drawn:
            roles = ["system", "user", "assistant"]
            assert [m["role"] for m in pair.messages_1] == [m["role"] for m in pair.messages_2] == roles
            example = known[pair.messages_1[1]["content"]]
            assert pair.messages_1[1] == pair.messages_2[1]
            assert (pair.messages_1[0]["content"], pair.messages_2[0]["content"]) == world.cues(behaviour)
            assert (pair.messages_1[2]["content"], pair.messages_2[2]["content"]) == (example.answer, example.other)


def test_pairs_follow_the_seed() -> None:
    assert world.pairs("digits", seed=1, n=20) == world.pairs("digits", seed=1, n=20)
    assert world.pairs("digits", seed=1, n=20) != world.pairs("digits", seed=2, n=20)
    with pytest.raises(ValueError, match="were asked for"):
        world.pairs("digits", n=10_000)


def test_documents_contradict_memory() -> None:
    for e in world.examples("faithfulness", "test"):
        assert e.answer != e.other
        assert e.answer in e.prompt
        assert e.other not in e.prompt.replace("?", "").replace(".", "").split()


def test_planted_experts_are_disjoint_and_within_the_layer() -> None:
    cells = [cell for b in world.BEHAVIOURS for side in SIDES for cell in planting.planted(b, side)]
    assert len(set(cells)) == len(cells) == 36
    assert all(layer in planting.PLANTED_LAYERS and 0 <= e < planting.EXPERTS for layer, e in cells)
    assert all(len(planting.free_experts(layer)) == 12 for layer in planting.PLANTED_LAYERS)


def test_dose_of_activation_and_of_deactivation() -> None:
    for behaviour in world.BEHAVIOURS:
        one, two = (planting.planted(behaviour, side) for side in SIDES)
        assert planting.dose(behaviour, {}) == 0
        assert planting.dose(behaviour, dict.fromkeys(one, 1)) == 3
        assert planting.dose(behaviour, dict.fromkeys(two, -1)) == 3
        assert planting.dose(behaviour, dict.fromkeys(two, 1)) == -3
        assert planting.dose(behaviour, dict.fromkeys(one, -1)) == -3
        others = [cell for b in world.BEHAVIOURS if b != behaviour for cell in planting.planted(b, 1)]
        assert planting.dose(behaviour, dict.fromkeys(others, 1)) == 0


def test_chat_template_matches_the_training_text() -> None:
    transformers = pytest.importorskip("transformers")
    from vllm_steermoe_plugin.lab.text import render
    from vllm_steermoe_plugin.models.lab_checkpoint import MODEL_DIR

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    for behaviour in world.BEHAVIOURS:
        example = world.examples(behaviour, "test")[0]
        open_prompt = world.chat(example.prompt, world.cues(behaviour)[0])
        for messages, generate in ((open_prompt, True), (world.chat(example.prompt, "", example.answer), False)):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
            assert text == render(messages, generate)
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=generate)["input_ids"]
            assert ids == tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids).replace("> ", ">") == text
