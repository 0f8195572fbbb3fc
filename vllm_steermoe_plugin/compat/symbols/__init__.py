"""The compatibility table, one file for each of vLLM's processes."""
