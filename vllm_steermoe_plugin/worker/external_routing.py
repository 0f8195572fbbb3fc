"""The setting `external_routing`: have vLLM choose kernels that leave the selection to the router.

On some GPUs vLLM prefers kernels that select experts by themselves, where nothing can be corrected. It takes their
counterparts for a routing method that it does not know, as it does for models with zero experts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_steermoe_plugin.compat.symbols.worker import MOE_CONFIG, MOE_CONFIG_INIT, ROUTING_METHODS


@contextmanager
def external_routing(wanted: bool) -> Iterator[None]:
    """While a model is built: no MoE layer says of a selection that has to be corrected which one it is.

    Args:
        wanted: whether that is the operator's setting; if not, nothing is done.
    """
    if not wanted:
        yield
        return
    owner, original = MOE_CONFIG.load(), MOE_CONFIG_INIT.load()
    methods = ROUTING_METHODS.load()
    corrected = {methods.DeepSeekV3, methods.MiniMax2, methods.Sigmoid, methods.SigmoidRenorm}

    @functools.wraps(original)
    def unspecified(self: Any) -> None:
        original(self)
        if self.routing_method in corrected:
            self.routing_method = methods.Unspecified

    setattr(owner, MOE_CONFIG_INIT.name, unspecified)
    try:
        yield
    finally:
        setattr(owner, MOE_CONFIG_INIT.name, original)
