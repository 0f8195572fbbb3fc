"""Runs in vLLM's engine core."""
