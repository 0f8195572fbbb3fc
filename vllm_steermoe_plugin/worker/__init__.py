"""Runs in vLLM's workers."""
