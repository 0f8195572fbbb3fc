"""A task whose prompts are chats with or without `--apply_chat_template`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval.api.task import ConfigurableTask


class LabTask(ConfigurableTask):  # type: ignore[misc]
    """A YAML task in the chat format of steermoe-lab.

    The lab model knows nothing but chats: to plain text it answers at random. So where
    lm-eval applies no chat template, the lab's own is applied here, and the numbers are
    the same either way.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """As lm-eval's, without its warning that a data set may take arguments; this one takes none of the user's."""
        self.dataset = self.config.custom_dataset(**(dataset_kwargs or {}))

    def fewshot_context(
        self,
        doc: dict[str, Any],
        *args: Any,
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = False,
        chat_template: Callable[..., str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As lm-eval's, but never without a chat template."""
        applied = chat_template if apply_chat_template and chat_template is not None else _lab_template
        return super().fewshot_context(
            doc, *args, apply_chat_template=True, fewshot_as_multiturn=True, chat_template=applied, **kwargs
        )


def _lab_template(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    from vllm_steermoe_plugin.lab.text import render

    return render(messages, generate=add_generation_prompt)
