"""What is touched in the engine's core."""

from __future__ import annotations

from vllm_steermoe_plugin.compat.internal import Internal

CORE = Internal("vllm.v1.engine.core:EngineCore", "know whether there is a default", reads=("scheduler", "vllm_config"))
CORE_PREPROCESS = Internal(
    CORE.path + ".preprocess_add_request",
    "refuse a request that no front end of ours has checked, where that ends the request and not the engine; "
    "let a counted request share cached blocks up to its first counted token",
    ("self", "request"),
    wrapped=True,
)
CORE_REQUEST = Internal(
    "vllm.v1.request:Request",
    "write the keys of a counted request's blocks, before the scheduler looks them up",
    reads=("block_hashes",),
)
SCHEDULER = Internal(
    "vllm.v1.core.sched.scheduler:Scheduler",
    "know of how many tokens a block's key is",
    reads=("hash_block_size",),
)
