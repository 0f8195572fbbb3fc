"""The former place of `vllm_steermoe_plugin.lab.training.train`."""

from __future__ import annotations

from vllm_steermoe_plugin.lab.training.train import main

if __name__ == "__main__":
    main()
