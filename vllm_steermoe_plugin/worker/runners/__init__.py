"""vLLM's two model runners. V2, its default on GPUs, is the main road; V1, which CPUs have, the side road."""
