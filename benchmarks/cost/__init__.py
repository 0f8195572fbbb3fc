"""What steering costs: stock vLLM and the plugin in turn."""
