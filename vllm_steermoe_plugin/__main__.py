"""`python -m vllm_steermoe_plugin` is `steermoe`."""

from vllm_steermoe_plugin.cli import main

main()
