"""The setting that keeps vLLM from kernels that select by themselves."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_steermoe_plugin.compat.symbols.worker import MOE_CONFIG, ROUTING_METHODS
from vllm_steermoe_plugin.worker.external_routing import external_routing

pytestmark = pytest.mark.engine


def made(method: Any) -> Any:
    config: Any = object.__new__(MOE_CONFIG.load())
    config.routing_method = method
    config.__post_init__()
    return config.routing_method


def test_what_has_to_be_corrected_is_of_no_known_method_while_a_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MOE_CONFIG.load(), "__post_init__", lambda self: None)
    methods = ROUTING_METHODS.load()
    corrected = [methods.DeepSeekV3, methods.MiniMax2, methods.Sigmoid, methods.SigmoidRenorm]
    with external_routing(True):
        assert {made(method) for method in corrected} == {methods.Unspecified}
        # Rules reach these at the gate, whatever selects behind it.
        assert [made(method) for method in (methods.Renormalize, methods.Llama4)] == [
            methods.Renormalize,
            methods.Llama4,
        ]
    assert [made(method) for method in corrected] == corrected
    with external_routing(False):
        assert [made(method) for method in corrected] == corrected


def test_vllms_own_is_back_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    before = MOE_CONFIG.load().__post_init__
    with pytest.raises(ValueError, match="built"), external_routing(True):
        raise ValueError("not built")
    assert MOE_CONFIG.load().__post_init__ is before
