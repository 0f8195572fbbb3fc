"""Rule table, rewrite and counters on the device. Knows torch, not vLLM."""
