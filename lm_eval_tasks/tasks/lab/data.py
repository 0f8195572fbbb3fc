"""The tasks' documents, made from the lab's world; nothing is downloaded."""

from __future__ import annotations

from dataclasses import asdict

from datasets import Dataset

from vllm_steermoe_plugin.lab import world


def documents(*, behaviour: str, control: bool, split: str = "test") -> dict[str, Dataset]:
    """A split, under the name `test`, as columns id, behaviour, prompt, answer, other.

    Args:
        behaviour: of `world.BEHAVIOURS`.
        control: prompts with one right answer instead of those that leave the behaviour open.
        split: of `world.SPLITS`; the tuning split is for `steermoe tune`.
    """
    examples = world.controls(behaviour, split) if control else world.examples(behaviour, split)
    return {"test": Dataset.from_list([asdict(example) for example in examples])}
