"""Values: what a request asks for, profiles and rule tables. Knows neither torch nor vLLM."""
