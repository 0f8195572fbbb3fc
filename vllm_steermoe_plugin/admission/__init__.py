"""Decide whether a request may be steered, and by which profile. Knows neither torch nor vLLM."""
