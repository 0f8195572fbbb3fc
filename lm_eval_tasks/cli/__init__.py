"""Sub-commands of `steermoe` that need lm-eval or its results; found by the entry points `steermoe.commands`."""
