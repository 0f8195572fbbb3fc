"""The tasks' documents, made from the lab's world; nothing is downloaded."""

from __future__ import annotations

from dataclasses import asdict

from datasets import Dataset

from vllm_steermoe_plugin.lab import world


def documents(*, behaviour: str, control: bool) -> dict[str, Dataset]:
    """The test split as columns id, behaviour, prompt, answer, other.

    Args:
        behaviour: of `world.BEHAVIOURS`.
        control: prompts with one right answer instead of those that leave the behaviour open.
    """
    examples = world.controls(behaviour, "test") if control else world.examples(behaviour, "test")
    return {"test": Dataset.from_list([asdict(example) for example in examples])}
