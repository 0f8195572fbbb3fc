"""The former place of `vllm_steermoe_plugin.lab.training.evaluate`."""

from __future__ import annotations

from vllm_steermoe_plugin.lab.training.evaluate import main

if __name__ == "__main__":
    main()
