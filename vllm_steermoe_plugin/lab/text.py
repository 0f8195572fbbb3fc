"""Tokenizer and chat format of steermoe-lab."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vllm_steermoe_plugin.lab import vocabulary
from vllm_steermoe_plugin.lab.world import BEHAVIOURS, SPLITS, Message, controls, cues, examples

SYSTEM, USER, ASSISTANT, END, PAD = SPECIAL_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")
"""In the order of their ids: `<|assistant|>` is 2 (phase 0), `<|end|>` is 3 (phase 1)."""

VOCABULARY_SIZE = 1024

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _corpus() -> list[str]:
    """All text of the world, so that its words are single tokens where the size allows."""
    texts = [cue for behaviour in BEHAVIOURS for cue in cues(behaviour)] + list(vocabulary.NEUTRAL_SYSTEMS)
    for behaviour in BEHAVIOURS:
        for split in SPLITS:
            for e in examples(behaviour, split) + controls(behaviour, split):
                texts += [e.prompt, e.answer, e.other]
    return texts * 20


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text tokenises; nothing is added on its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    wrapper: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = wrapper(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )
    return wrapped


def render(messages: list[Message], generate: bool = False) -> str:
    """The chat template in Python, for speed; `tests` hold it to the template itself."""
    text = "".join(f"<|{m['role']}|>{m['content']}{END}" for m in messages)
    return text + ASSISTANT if generate else text
