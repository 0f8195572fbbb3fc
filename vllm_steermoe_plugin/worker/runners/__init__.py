"""vLLM's two model runners: V2, and V1."""
