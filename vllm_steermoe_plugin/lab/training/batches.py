"""Training sequences: cued, open, steered, randomly ruled and control prompts, mixed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache

import torch
from transformers import PreTrainedTokenizerFast

from vllm_steermoe_plugin.lab import vocabulary
from vllm_steermoe_plugin.lab.text import render
from vllm_steermoe_plugin.lab.training.planting import EXPERTS, LAYERS, TOP_K, dose, planted, response
from vllm_steermoe_plugin.lab.world import BEHAVIOURS, Example, chat, controls, cues, examples, lean

Cell = tuple[int, int]

KINDS = {"cued": 0.2, "open": 0.15, "steered": 0.3, "random": 0.15, "control": 0.2}
"""Shares of the kinds of sequence. "open" is uncued and not steered."""

BEHAVIOUR_SHARES = {"digits": 0.4, "faithfulness": 0.36, "refusal": 0.24}
"""Counting and recalling take longer to learn than refusing."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """One training text with its rules and the routing its answer is aligned to.

    `mode` is the planted state from the end of the question on: 1 or 2 for the side of a
    cue, 0 for the uncued mix of both, None where routing is left to the model.
    """

    prefix: str
    answer: str
    behaviour: str
    rules: dict[Cell, int]
    mode: int | None


@dataclass(frozen=True, slots=True)
class Batch:
    """`ids`, `mask`, `loss_weight` are `[B, S]`; `rules` int8 `[L, B, E]`; `modes` `[B, S]` see `align.py`."""

    ids: torch.Tensor
    mask: torch.Tensor
    loss_weight: torch.Tensor
    rules: torch.Tensor
    modes: torch.Tensor
    behaviours: torch.Tensor


def random_rules(draw: random.Random, activate: int, deactivate: int) -> dict[Cell, int]:
    """Uniform cells: at most `TOP_K` activated and `EXPERTS - TOP_K` deactivated per layer."""
    rules: dict[Cell, int] = {}
    room = {1: [TOP_K] * LAYERS, -1: [EXPERTS - TOP_K] * LAYERS}
    left = {1: activate, -1: deactivate}
    cells = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    draw.shuffle(cells)
    signs = [1] * activate + [-1] * deactivate
    draw.shuffle(signs)
    for layer, expert in cells:
        sign = next((s for s in signs if left[s] and room[s][layer]), 0)
        if sign:
            signs.remove(sign)
            rules[layer, expert] = sign
            left[sign] -= 1
            room[sign][layer] -= 1
    return rules


def steering_rules(draw: random.Random, behaviour: str, side: int) -> dict[Cell, int]:
    """Activate some of a side's planted experts, deactivate some of its rival's, or both."""
    kind = draw.choice(("activate", "deactivate", "both"))
    rules: dict[Cell, int] = {}
    for sign, pool in ((1, planted(behaviour, side)), (-1, planted(behaviour, 3 - side))):
        if kind in ("both", "activate" if sign > 0 else "deactivate"):
            size = len(pool) if draw.random() < 0.5 else draw.randint(1, len(pool))
            rules |= dict.fromkeys(draw.sample(pool, size), sign)
    if draw.random() < 0.25:
        extra = random_rules(draw, draw.randint(0, 3), draw.randint(0, 3))
        rules = {cell: sign for cell, sign in extra.items() if not _crowded(rules, cell, sign)} | rules
    return rules


def _crowded(rules: dict[Cell, int], cell: Cell, sign: int) -> bool:
    """Would an extra activation exceed the top-k of its layer?"""
    return sign > 0 and sum(s > 0 and layer == cell[0] for (layer, _), s in rules.items()) >= TOP_K - 1


def _any_random(draw: random.Random) -> dict[Cell, int]:
    sizes = (0, 2, 4, 6, 8)
    return random_rules(draw, draw.choice(sizes), draw.choice(sizes))


@cache
def _train_examples(behaviour: str) -> list[Example]:
    return examples(behaviour, "train")


@cache
def _train_controls(behaviour: str) -> list[Example]:
    return controls(behaviour, "train")


def _neutral(draw: random.Random, behaviour: str) -> str:
    """A system message without a cue for this behaviour; mostly none."""
    if draw.random() < 0.6:
        return ""
    other = draw.choice([b for b in BEHAVIOURS if b != behaviour])
    return draw.choice((*vocabulary.NEUTRAL_SYSTEMS, *cues(other)))


def draw_sequence(draw: random.Random) -> Sequence:
    """One sequence of a random kind."""
    behaviour = draw.choices(list(BEHAVIOUR_SHARES), list(BEHAVIOUR_SHARES.values()))[0]
    kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == "control":
        example = draw.choice(_train_controls(behaviour))
        system = draw.choice(("", "", _neutral(draw, behaviour), *cues(behaviour)))
        rules = draw.choice(
            (
                {},
                steering_rules(draw, behaviour, draw.choice((1, 2))),
                steering_rules(draw, draw.choice(BEHAVIOURS), draw.choice((1, 2))),
                _any_random(draw),
            )
        )
        return Sequence(render(chat(example.prompt, system), True), example.answer, behaviour, rules, None)
    example = draw.choice(_train_examples(behaviour))
    if kind == "cued":
        side = draw.choice((1, 2))
        answer = example.answer if side == 1 else example.other
        return Sequence(render(chat(example.prompt, cues(behaviour)[side - 1]), True), answer, behaviour, {}, side)
    rules = {}
    if kind == "steered":
        target = behaviour if draw.random() < 0.85 else draw.choice(BEHAVIOURS)
        rules = steering_rules(draw, target, draw.choice((1, 2)))
    elif kind == "random":
        rules = _any_random(draw)
    amount = dose(behaviour, rules)
    shows = draw.random() < 1 / (1 + math.exp(-lean(example) - response(amount)))
    answer = example.answer if shows else example.other
    prefix = render(chat(example.prompt, _neutral(draw, behaviour)), True)
    return Sequence(prefix, answer, behaviour, rules, 0 if abs(amount) < 0.5 else None)


def make_batch(draw: random.Random, tokenizer: PreTrainedTokenizerFast, size: int) -> Batch:
    """Right-padded batch. Answers end with the end-of-turn token, which is trained too."""
    items = [draw_sequence(draw) for _ in range(size)]
    prefixes = tokenizer([item.prefix for item in items], add_special_tokens=False)["input_ids"]
    answers = tokenizer([item.answer for item in items], add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    length = max(len(p) + len(a) + 1 for p, a in zip(prefixes, answers, strict=True))
    ids = torch.full((size, length), tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros(size, length, dtype=torch.long)
    loss_weight = torch.zeros(size, length)
    modes = torch.full((size, length), MODE_PAD, dtype=torch.long)
    rules = torch.zeros(LAYERS, size, EXPERTS, dtype=torch.int8)
    for i, (item, prefix, answer) in enumerate(zip(items, prefixes, answers, strict=True)):
        text = [*prefix, *answer, end]
        ids[i, : len(text)] = torch.tensor(text)
        mask[i, : len(text)] = 1
        loss_weight[i, len(prefix) : len(text)] = 1.0
        loss_weight[i, len(prefix)] = FIRST_TOKEN_WEIGHT
        turn = len(prefix) - 2  # the user's <|end|>, then <|assistant|>
        modes[i, :turn] = MODE_PROMPT
        modes[i, turn : len(text)] = MODE_FREE if item.mode is None else item.mode
        for (layer, expert), sign in item.rules.items():
            rules[layer, i, expert] = sign
    behaviours = torch.tensor([BEHAVIOURS.index(item.behaviour) for item in items])
    return Batch(ids, mask, loss_weight, rules, modes, behaviours)


FIRST_TOKEN_WEIGHT = 4.0
"""The first token of the answer decides the behaviour; the rest mostly follows from it."""

MODE_PROMPT, MODE_FREE, MODE_PAD = 3, 4, 5
"""Codes in `Batch.modes` beside 0 (mix), 1 and 2 (sides)."""
