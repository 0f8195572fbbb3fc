"""How far steering moves the next token: KL divergence from the unsteered model, at the end of each of some prompts.

It needs no judge and no answers, so it sees what a control task of right and wrong answers does not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from expert_registry.errors import UsageError
from lm_eval_tasks.compare.run_file import Run
from lm_eval_tasks.evaluation import Options, Steering
from vllm_steermoe_plugin.detection.rows import DataError, read_data, read_rows, text_of
from vllm_steermoe_plugin.steering.request import NONE

CONTROLS = "controls"
MOST_PROMPTS = 128
"""How many prompts are used, shared equally by the tasks they come from."""
MAX_KL = 0.03
"""Mean divergence on the prompts of controls up to which they count as held (docs/dial.md has what it rests on)."""
MOST_REQUESTS = 4096
"""How many requests are in one batch, for their log-probabilities stay in memory."""
_FLOOR = -100.0
"""The least log-probability; that of a masked token is -inf."""
_NOISE = 1e-6
"""What is left of 1 beside the whole vocabulary in float32."""


class NextTokens(Protocol):
    """A model that says how likely the next tokens are."""

    def next_tokens(self, prompts: Sequence[str], texts: Sequence[str]) -> list[list[dict[int, float]]]:
        """For each steering expression, for each prompt: token -> log-probability, of the most likely tokens."""


def divergence(unsteered: Mapping[int, float], steered: Mapping[int, float]) -> float:
    """KL(unsteered || steered) in nats, from the log-probabilities of the most likely tokens.

    All tokens that are not in both count as one. Merging outcomes never raises a divergence, so this is a lower bound,
    and the divergence itself where both have the whole vocabulary.
    """
    shared = [(value, max(steered[token], _FLOOR)) for token, value in unsteered.items() if token in steered]
    terms = [math.exp(p) * (p - q) for p, q in shared if p > _FLOOR]
    rest = [1.0 - math.fsum(math.exp(pair[side]) for pair in shared) for side in (0, 1)]
    if rest[0] > _NOISE:
        terms.append(rest[0] * math.log(rest[0] / max(rest[1], _NOISE)))
    return max(0.0, math.fsum(terms))


def divergences(model: NextTokens, prompts: Sequence[str], texts: Sequence[str]) -> list[list[float]]:
    """For each steering expression its divergence at the end of each prompt, in as few batches as may be."""
    if not prompts or not texts:
        return [[] for _ in texts]
    (unsteered,) = model.next_tokens(prompts, [NONE])
    at_once = max(1, MOST_REQUESTS // len(prompts))
    return [
        [divergence(p, q) for p, q in zip(unsteered, steered, strict=True)]
        for at in range(0, len(texts), at_once)
        for steered in model.next_tokens(prompts, texts[at : at + at_once])
    ]


def with_divergences(run: Run, model: NextTokens, plan: Sequence[Steering], prompts: Sequence[str]) -> Run:
    """A run with the divergences of all its steered and random profiles that `plan` has."""
    texts = {steering.name: steering.text for steering in plan if steering.kind != "none"}
    found = dict(zip(texts, divergences(model, prompts, list(texts.values())), strict=True))
    profiles = [one.model_copy(update={"divergence": found.get(one.name, one.divergence)}) for one in run.profiles]
    return run.model_copy(update={"profiles": profiles})


@dataclass(frozen=True, slots=True)
class PromptSource:
    """Where the prompts are from: a file, or tasks; false if there are to be none."""

    file: Path | None = None
    tasks: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.file is not None or bool(self.tasks)

    @property
    def identity(self) -> str:
        """What tells other prompts of the same tasks apart.

        Raises:
            DataError: the file cannot be read.
        """
        if self.file is None:
            return CONTROLS if self.tasks else "none"
        return hashlib.sha256(read_data(self.file)).hexdigest()

    def prompts(self, model: Any, manager: Any, options: Options) -> list[str]:
        """At most `MOST_PROMPTS`, as they go to the model.

        Raises:
            DataError: the file cannot be read, or there are none.
        """
        if self.file is not None:
            return _in_file(self.file, model, options.chat_template)
        return _of_tasks(self.tasks, model, manager, options)


def prompt_source(text: str, controls: Sequence[str]) -> PromptSource:
    """From the option `--kl-prompts`: `controls`, the path of a file, or nothing.

    Raises:
        UsageError: there are no controls.
    """
    if text == CONTROLS and not controls:
        raise UsageError("--kl-prompts controls: no control task is named; give a file of prompts")
    return PromptSource(None, tuple(controls)) if text == CONTROLS else PromptSource(Path(text) if text else None)


def _in_file(path: Path, model: Any, chat_template: bool) -> list[str]:
    """From the column `prompt`, or one a line."""
    found = [text_of(row, "prompt", place) for place, row in read_rows(path)][:MOST_PROMPTS]
    if not chat_template:
        return found
    return [str(model.apply_chat_template([{"role": "user", "content": prompt}])) for prompt in found]


def _of_tasks(tasks: Sequence[str], model: Any, manager: Any, options: Options) -> list[str]:
    """The first prompts of each task as lm-eval sends them, each once."""
    loaded = manager.load(list(tasks))["tasks"] if tasks else {}
    found: dict[str, None] = {}
    for name, task in loaded.items():
        task.build_all_requests(
            limit=options.limit,
            samples=(options.samples or {}).get(name),
            apply_chat_template=options.chat_template,
            fewshot_as_multiturn=options.chat_template,
            chat_template=model.apply_chat_template if options.chat_template else None,
            tokenizer_name=model.tokenizer_name if options.chat_template else "",
        )
        prompts = dict.fromkeys(str(instance.args[0]) for instance in task.instances if instance.args[0])
        found.update(dict.fromkeys(list(prompts)[: max(1, MOST_PROMPTS // len(loaded))]))
    if loaded and not found:
        raise DataError(f"the tasks {', '.join(loaded)} have no prompts; give --kl-prompts a file that has")
    return list(found)
