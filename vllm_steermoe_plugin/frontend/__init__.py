"""Runs in vLLM's API server, or where `LLM` is: requests are checked and resolved here."""
