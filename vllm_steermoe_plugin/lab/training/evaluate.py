"""Measure steermoe-lab with torch alone: `python -m vllm_steermoe_plugin.lab.training.evaluate MODEL_DIR`.

Detection counts from contrastive pairs, precision and recall against the planted
experts, then rates under greedy decoding: unsteered, steered, reversed, random.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from vllm_steermoe_plugin.lab.text import ASSISTANT
from vllm_steermoe_plugin.lab.training.batches import random_rules
from vllm_steermoe_plugin.lab.training.network import RuledRouter, install_routers, load_model, set_rules
from vllm_steermoe_plugin.lab.training.planting import EXPERTS, LAYERS, TOP_K, planted
from vllm_steermoe_plugin.lab.world import BEHAVIOURS, Example, Message, chat, controls, correct, examples, pairs, shows

Cell = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Lab:
    """A loaded model with its tokenizer and rule-obeying routers."""

    model: Qwen3MoeForCausalLM
    tokenizer: PreTrainedTokenizerFast
    routers: list[RuledRouter]

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> Lab:
        """Load the model in `folder` for inference in `dtype`."""
        model = load_model(folder, dtype)
        return cls(model, PreTrainedTokenizerFast.from_pretrained(folder), install_routers(model))


@dataclass(frozen=True, slots=True)
class Outcome:
    """Rates in percent for one behaviour and one way of steering; `random_*` list one entry per draw."""

    behaviour: str
    activate: int
    deactivate: int
    unsteered: float
    steered: float
    reversed: float
    random: list[float]
    control_unsteered: float
    control_steered: float
    control_reversed: float
    control_random: list[float]

    @property
    def random_change(self) -> float:
        """Mean absolute change under random experts, in points."""
        return float(np.mean([abs(rate - self.unsteered) for rate in self.random] or [np.nan]))


@torch.no_grad()
def answer_counts(lab: Lab, conversations: list[list[Message]]) -> tuple[np.ndarray, int]:
    """Top-k counts `[L, E]` over the answers' tokens (without `<|end|>`) and their number."""
    set_rules(lab.routers, None)
    counts = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
    total = 0
    assistant = lab.tokenizer.convert_tokens_to_ids(ASSISTANT)
    for messages in conversations:
        ids = lab.tokenizer(lab.tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt").input_ids
        lab.model(input_ids=ids)
        start = ids[0].tolist().index(assistant) + 1
        total += ids.shape[1] - 1 - start
        for layer, router in enumerate(lab.routers):
            counts[layer] += np.bincount(router.chosen[start:-1].flatten().numpy(), minlength=EXPERTS)
    return counts, total


def risk_differences(lab: Lab, behaviour: str, seed: int = 0, n: int | None = None) -> np.ndarray:
    """`[L, E]`: share of answer tokens routed to each expert under cue 1 minus cue 2."""
    chosen = pairs(behaviour, seed=seed, n=n)
    counts_1, total_1 = answer_counts(lab, [pair.messages_1 for pair in chosen])
    counts_2, total_2 = answer_counts(lab, [pair.messages_2 for pair in chosen])
    difference: np.ndarray = counts_1 / total_1 - counts_2 / total_2
    return difference


def rules_from(difference: np.ndarray, activate: int, deactivate: int) -> dict[Cell, int]:
    """The first experts by |rd|: positive ones activated, negative ones deactivated, within the caps."""
    order = sorted(np.ndindex(*difference.shape), key=lambda cell: -abs(difference[cell]))
    rules: dict[Cell, int] = {}
    for sign, wanted, cap in ((1, activate, TOP_K), (-1, deactivate, EXPERTS - TOP_K)):
        used = [0] * LAYERS
        for layer, expert in [cell for cell in order if sign * difference[cell] > 0][:wanted]:
            # As the plugin does it: what a full layer cannot take is left out, and no other comes in its place.
            if used[layer] < cap:
                rules[layer, expert] = sign
                used[layer] += 1
    return rules


def _tensor(rules: dict[Cell, int]) -> torch.Tensor | None:
    """int8 `[L, E]`, or None without rules."""
    if not rules:
        return None
    tensor = torch.zeros(LAYERS, EXPERTS, dtype=torch.int8)
    for cell, sign in rules.items():
        tensor[cell] = sign
    return tensor


@torch.no_grad()
def generate(lab: Lab, prompts: list[str], rules: dict[Cell, int], tokens: int, system: str = "") -> list[str]:
    """Greedy answers to user messages under `rules`, of at most `tokens` tokens."""
    set_rules(lab.routers, _tensor(rules))
    texts = [
        lab.tokenizer.apply_chat_template(chat(prompt, system), tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    batch = lab.tokenizer(texts, return_tensors="pt", padding=True)
    model: Any = lab.model
    out = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=tokens, do_sample=False
    )
    return list(lab.tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True))


def behaviour_rate(lab: Lab, items: list[Example], rules: dict[Cell, int], system: str = "") -> float:
    """Percentage of answers that show the behaviour; its first word is enough to tell."""
    texts = generate(lab, [e.prompt for e in items], rules, 3, system)
    return 100 * float(np.mean([shows(e.behaviour, e, text) for e, text in zip(items, texts, strict=True)]))


def control_rate(lab: Lab, items: list[Example], rules: dict[Cell, int]) -> float:
    """Percentage of control prompts answered right, word for word."""
    texts = generate(lab, [e.prompt for e in items], rules, 12)
    return 100 * float(np.mean([correct(e, text) for e, text in zip(items, texts, strict=True)]))


def measure(lab: Lab, difference: np.ndarray, behaviour: str, *, split: str, sizes: Cell, draws: int) -> Outcome:
    """All rates of one behaviour for `sizes` = (activated, deactivated)."""
    items, fixed = examples(behaviour, split), controls(behaviour, split)
    steered, back = rules_from(difference, *sizes), rules_from(-difference, *sizes)
    drawn = [random_rules(random.Random(f"evaluate {sizes} {i}"), *sizes) for i in range(draws)]
    return Outcome(
        behaviour,
        *sizes,
        unsteered=behaviour_rate(lab, items, {}),
        steered=behaviour_rate(lab, items, steered),
        reversed=behaviour_rate(lab, items, back),
        random=[behaviour_rate(lab, items, rules) for rules in drawn],
        control_unsteered=control_rate(lab, fixed, {}),
        control_steered=control_rate(lab, fixed, steered),
        control_reversed=control_rate(lab, fixed, back),
        control_random=[control_rate(lab, fixed, rules) for rules in drawn],
    )


def recovery(difference: np.ndarray, behaviour: str) -> float:
    """Share of planted experts among as many first of the ranking, with the right sign (precision = recall)."""
    wanted = {(cell, 1) for cell in planted(behaviour, 1)} | {(cell, -1) for cell in planted(behaviour, 2)}
    order = sorted(np.ndindex(*difference.shape), key=lambda cell: -abs(difference[cell]))[: len(wanted)]
    found = {((layer, expert), int(np.sign(difference[layer, expert]))) for layer, expert in order}
    return len(found & wanted) / len(wanted)


def show(console: Console, outcomes: list[Outcome]) -> None:
    """Print outcomes, rates in percent."""
    table = Table(
        "behaviour", "+", "-", "unsteered", "steered", "reversed", "random |change|", "worst", "controls u/s/r/rand"
    )
    for o in outcomes:
        worst = max((abs(rate - o.unsteered) for rate in o.random), default=0.0)
        held = (o.control_unsteered, o.control_steered, o.control_reversed, np.mean(o.control_random or [np.nan]))
        control = " ".join(f"{rate:.1f}" for rate in held)
        rates = (o.unsteered, o.steered, o.reversed, o.random_change, worst)
        table.add_row(o.behaviour, str(o.activate), str(o.deactivate), *(f"{rate:.1f}" for rate in rates), control)
    console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--sizes", nargs="+", default=["6+0", "0+6", "6+6"], help="activated+deactivated")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the detection pairs")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    console = Console(width=140)
    lab = Lab.load(a.model, getattr(torch, a.dtype))
    outcomes = []
    for behaviour in BEHAVIOURS:
        difference = risk_differences(lab, behaviour, a.seed)
        console.print(f"{behaviour}: {recovery(difference, behaviour):.0%} of the planted experts lead the ranking")
        for sizes in a.sizes:
            activate, deactivate = map(int, sizes.split("+"))
            outcomes.append(
                measure(lab, difference, behaviour, split=a.split, sizes=(activate, deactivate), draws=a.draws)
            )
    show(console, outcomes)
    if a.json:
        a.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")


if __name__ == "__main__":
    main()
