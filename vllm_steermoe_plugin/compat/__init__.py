"""The only place that names vLLM's internals."""
