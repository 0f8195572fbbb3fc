"""A worker whose last rank is as on a machine without this package: it builds vLLM's own model."""

from __future__ import annotations

from vllm.model_executor.models.registry import ModelRegistry
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_steermoe_plugin.worker.variants import upstream_class

ARCHITECTURE = "OlmoeForCausalLM"


class AbsentWorker(CPUWorker):
    """vLLM's, but for the registered class."""

    def load_model(self, *args: object, **kwargs: object) -> None:
        """Forget the variant first, on the last rank."""
        if self.rank == self.parallel_config.world_size - 1:
            ModelRegistry.register_model(ARCHITECTURE, upstream_class(ARCHITECTURE))
        super().load_model(*args, **kwargs)
