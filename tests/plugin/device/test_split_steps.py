"""Configurations in which the host does not know which token of a step is whose are refused before anything runs."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expert_registry.errors import EngineError
from vllm_steermoe_plugin.compat.symbols.config import CACHE_CONFIG, PARALLEL_CONFIG, VLLM_CONFIG
from vllm_steermoe_plugin.compat.symbols.registry import BUILT_IN_MODELS, MODELS_PACKAGE, PACKAGE
from vllm_steermoe_plugin.models.architectures import ARCHITECTURES, language_model_of
from vllm_steermoe_plugin.models.engine_limits import refuse_unsupported
from vllm_steermoe_plugin.settings import Settings

OLMOE = ARCHITECTURES["OlmoeForCausalLM"]


def config(speculative: Any = None, *, fast_prefill: bool = False, **parallel: Any) -> Any:
    """As much of a VllmConfig as is looked at, with the fields' real names."""
    plain: dict[str, Any] = {
        "use_ubatching": False,
        "enable_elastic_ep": False,
        "prefill_context_parallel_size": 1,
        "data_parallel_size": 1,
    }
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**{**plain, **parallel}),
        speculative_config=speculative,
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=fast_prefill),
        additional_config={},
        kernel_config=SimpleNamespace(),
        aux_output_config=SimpleNamespace(enabled=False),
        kv_transfer_config=None,
    )


def speculating(method: str = "standard", *, adaptive: bool = False) -> Any:
    return config(SimpleNamespace(enable_adaptive_verification=adaptive, rejection_sample_method=method))


def with_kernel(**options: Any) -> Any:
    found = config()
    found.kernel_config = SimpleNamespace(**options)
    return found


def with_decode_backend(name: str) -> Any:
    found = config()
    found.additional_config = {"decode_backend": name}
    return found


def test_the_fields_are_vllms() -> None:
    # `test_internals.py` checks that vLLM has what the ledger names.
    assert set(vars(config().parallel_config)) <= set(PARALLEL_CONFIG.reads)
    assert set(vars(config().cache_config)) <= set(CACHE_CONFIG.reads)
    assert set(vars(config())) <= set(VLLM_CONFIG.reads)


def test_ordinary_configurations_are_taken() -> None:
    refuse_unsupported(config(), Settings())
    for method in ("standard", "block"):
        refuse_unsupported(speculating(method), Settings())


def test_others_are_refused_with_the_reason_and_the_way_out() -> None:
    for refused, says in [
        (config(use_ubatching=True), "micro-batching"),
        (config(fast_prefill=True), "kv_sharing_fast_prefill"),
        (config(prefill_context_parallel_size=2), "prefill context parallelism"),
        (speculating(adaptive=True), "adaptive verification"),
        (speculating("fly"), "accepts draft tokens"),
        (speculating("synthetic"), "accepts draft tokens"),
    ]:
        with pytest.raises(EngineError, match=says) as error:
            refuse_unsupported(refused, Settings())
        assert "switch steering off" in str(error.value)


HERE = ARCHITECTURES.keys() & BUILT_IN_MODELS.load().keys()


def source_of(architecture: str) -> str:
    """Of the file with vLLM's model class."""
    module = BUILT_IN_MODELS.load()[architecture][0]
    place = module if module.startswith(PACKAGE) else f"{MODELS_PACKAGE}.{module}"
    found = find_spec(place)
    assert found is not None and found.origin is not None
    return Path(found.origin).read_text(encoding="utf-8")


def test_the_table_says_which_models_change_their_logits() -> None:
    rounding = re.compile(r"router_logits\s*=\s*router_logits\.(to|float|half|bfloat16)\(")
    found = {name for name in HERE if rounding.search(source_of(name))}
    # Sarvam's is the class of Bailing.
    assert found | {"SarvamMoEForCausalLM"} == {name for name, row in ARCHITECTURES.items() if row.changes_logits}


def test_the_table_says_which_models_pass_by_their_gate() -> None:
    """Handing on a gate's weights instead of calling it."""
    passing = re.compile(r"is_rocm\(\):\n[^\n]*gemm\(\n[^\n]*self\.(gate|router)\.weight")
    found = {name for name in HERE if passing.search(source_of(name))}
    assert found and found == {name for name, row in ARCHITECTURES.items() if row.passes_gate_on_rocm}


def test_what_holds_of_a_language_model_holds_of_the_model_around_it() -> None:
    around = {"architectures": ["InternVLChatModel"], "text_config": {"architectures": ["GptOssForCausalLM"]}}
    language = language_model_of(SimpleNamespace(**around), "InternVLChatModel")
    assert language == ARCHITECTURES["GptOssForCausalLM"] and language.passes_gate_on_rocm
