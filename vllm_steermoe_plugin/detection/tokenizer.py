"""The engine's tokenizer, if it says which characters its tokens stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from expert_registry.errors import UnsupportedFeatureError

if TYPE_CHECKING:
    from vllm import LLM


def offset_tokenizer(engine: LLM) -> Any:
    """The engine's tokenizer, with `chat_template` and character offsets.

    Raises:
        UnsupportedFeatureError: the engine has none, or it gives no offsets.
    """
    try:
        tokenizer = engine.get_tokenizer()
    except ValueError as error:
        raise UnsupportedFeatureError(f"texts cannot be read without a tokenizer: {error}") from None
    try:
        found = hasattr(tokenizer, "chat_template") and tokenizer(["a b"], return_offsets_mapping=True)
    # What tokenizers raise that are not of Hugging Face's fast kind.
    except (NotImplementedError, TypeError, ValueError):
        found = None
    if not found or "offset_mapping" not in found:
        raise UnsupportedFeatureError(
            f"the tokenizer {type(tokenizer).__name__} does not say which characters its tokens stand for; start the "
            "engine with the model's fast Hugging Face tokenizer (tokenizer_mode='hf', or another one by tokenizer=)"
        )
    return tokenizer
