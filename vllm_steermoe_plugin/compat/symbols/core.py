"""What is touched in the engine's core."""

from __future__ import annotations

from vllm_steermoe_plugin.compat.internal import Internal

BLOCK_KEYS = Internal(
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
    "let a counted request find in the prefix cache what comes before its first counted token, and no more (wrapped; "
    "the function that hashes a request's blocks calls it by its name in the module, others may have taken it before)",
    ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
)
CORE_REQUEST = Internal("vllm.v1.request:Request", "see whether it is counted", reads=("sampling_params",))
CORE = Internal("vllm.v1.engine.core:EngineCore", "know whether there is a default", reads=("vllm_config",))
CORE_TAKES = Internal(
    CORE.path + ".preprocess_add_request",
    "refuse a request that no front end of ours has checked, where that ends the request and not the engine (wrapped)",
    ("self", "request"),
)
