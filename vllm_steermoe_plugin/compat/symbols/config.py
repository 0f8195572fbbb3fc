"""What is read of an engine's configuration."""

from __future__ import annotations

from vllm_steermoe_plugin.compat.internal import Internal

VLLM_CONFIG = Internal(
    "vllm.config:VllmConfig",
    "find the parts of an engine's configuration; ask which model runner would be live, and whether there is a "
    "language model at all",
    reads=(
        "additional_config",
        "aux_output_config",
        "cache_config",
        "compilation_config",
        "is_mm_encoder_only",
        "kernel_config",
        "kv_transfer_config",
        "lora_config",
        "model_config",
        "parallel_config",
        "scheduler_config",
        "speculative_config",
        "use_v2_model_runner",
    ),
)
MODEL_CONFIG = Internal(
    "vllm.config:ModelConfig",
    "have `steermoe doctor` read a model's config as vLLM does; know what model an engine serves, under which names, "
    "and the parts and drafts of models from models",
    reads=(
        "architecture",
        "dtype",
        "get_layers_start_end_indices",
        "hf_config",
        "is_submodel_config",
        "max_model_len",
        "model",
        "runner_type",
        "served_model_name",
    ),
)
PARALLEL_CONFIG = Internal(
    "vllm.config:ParallelConfig",
    "refuse what splits a step's tokens before the gate, and workers that start later; know whether several front-end "
    "processes must agree; add the plugin's methods to the workers",
    reads=(
        "_api_process_count",
        "data_parallel_size",
        "enable_elastic_ep",
        "prefill_context_parallel_size",
        "tensor_parallel_size",
        "use_ubatching",
        "worker_extension_cls",
    ),
)
CACHE_CONFIG = Internal(
    "vllm.config:CacheConfig",
    "refuse that only some of a step's tokens go through the last layers",
    reads=("kv_sharing_fast_prefill",),
)
SPECULATIVE_CONFIG = Internal(
    "vllm.config:SpeculativeConfig",
    "refuse that the GPU decides which token belongs to which request, or that unsteered drafts are taken",
    reads=("enable_adaptive_verification", "rejection_sample_method"),
)
AUX_OUTPUT_CONFIG = Internal(
    "vllm.config.aux_output:AuxOutputConfig",
    "refuse counting where vLLM itself takes the selected experts",
    reads=("enabled",),
)
SCHEDULER_CONFIG = Internal(
    "vllm.config:SchedulerConfig",
    "allocate for the largest step",
    reads=("max_num_seqs", "max_num_batched_tokens"),
)
COMPILATION_CONFIG = Internal(
    "vllm.config:CompilationConfig", "allocate for the largest step", reads=("max_cudagraph_capture_size",)
)
KV_CONNECTORS = Internal(
    "vllm.config:KVTransferConfig",
    "refuse KV connectors that do not keep steerings apart",
    reads=("kv_connector", "kv_connector_extra_config", "kv_connector_module_path"),
)
CONFIGS = (
    VLLM_CONFIG,
    MODEL_CONFIG,
    PARALLEL_CONFIG,
    CACHE_CONFIG,
    SPECULATIVE_CONFIG,
    AUX_OUTPUT_CONFIG,
    SCHEDULER_CONFIG,
    COMPILATION_CONFIG,
    KV_CONNECTORS,
)
"""What is read of an engine's configuration."""
V2_MISSING = Internal(
    "vllm.config:VllmConfig._get_v2_model_runner_unsupported_features", "say why Model Runner V1 would be live"
)
HAS_TRITON = Internal("vllm.triton_utils:HAS_TRITON", "say why Model Runner V1 would be live")
CURRENT_PLATFORM = Internal("vllm.platforms:current_platform", "refuse models whose gate is not called on ROCm")
