"""Steering of mixture-of-experts models inside vLLM.

`register` is the `vllm.general_plugins` entry point. vLLM calls it in every process it
starts: the front end, the engine core and each worker. Importing this package imports
neither torch nor vLLM.
"""

from __future__ import annotations


def register() -> None:
    """Register the steering-aware variants and the front-end hook; may be called more than once.

    What it changes in the process: the built-in names of the architectures in
    `models/architectures.py` resolve to variants that derive from vLLM's own classes, and requests
    pass a check on their way in. Requests that ask for no steering are computed as without
    the plugin. `VLLM_PLUGINS` (vLLM's allow-list) leaves it out altogether.

    Raises:
        EngineError: this vLLM is not supported.
    """
    from vllm_steermoe_plugin.registration import register_all

    register_all()
