"""What is touched in the workers: gates, routers, LoRA layers and model runners."""

from __future__ import annotations

from vllm_steermoe_plugin.compat.internal import Internal

GATE_LINEAR = Internal(
    "vllm.model_executor.layers.fused_moe:GateLinear",
    "rewrite the router logits where every MoE model computes them (replaced through register_oot)",
    reads=("register_oot", "output_size", "prefix", "out_dtype"),
)
GATE_FORWARD = Internal(
    "vllm.model_executor.layers.fused_moe:GateLinear.forward", "call the original gate", ("self", "x")
)
REPLACED_LAYERS = Internal(
    "vllm.model_executor.custom_op:op_registry_oot", "see whether another plugin has replaced the gate"
)
V1_RUNNER = Internal(
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
    "know Model Runner V1 when it is live; see its model, its requests and its batch",
    reads=("get_model", "input_batch", "requests", "vllm_config"),
)
V1_PREPARE_INPUTS = Internal(
    V1_RUNNER.path + "._prepare_inputs",
    "learn which request owns which token of a step",
    ("self", "scheduler_output", "num_scheduled_tokens"),
    wrapped=True,
)
V1_DUMMY_RUN = Internal(
    V1_RUNNER.path + "._dummy_run", "steer and count nothing in dummy runs", ("self", "num_tokens"), wrapped=True
)
V1_BATCH = Internal(
    "vllm.v1.worker.gpu_input_batch:InputBatch",
    "learn the order of the requests and how far each is",
    reads=("req_ids", "num_computed_tokens_cpu"),
)
V1_REQUEST = Internal(
    "vllm.v1.worker.gpu_input_batch:CachedRequestState",
    "see what a request asks for",
    reads=("sampling_params", "num_prompt_tokens"),
)
V1_SCHEDULED = Internal(
    "vllm.v1.core.sched.output:SchedulerOutput", "see which requests have ended", reads=("finished_req_ids",)
)
V2_RUNNER = Internal(
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
    "know Model Runner V2 when it is live, and its model",
    reads=("get_model", "model_state", "vllm_config"),
)
WORKER = Internal("vllm.v1.worker.gpu_worker:Worker", "reach the model runner of a worker", reads=("model_runner",))
V2_RESOLVE_STATE = Internal(
    "vllm.v1.worker.gpu.model_states:resolve_model_state_cls",
    "find the ModelState that vLLM would have chosen, to derive from it",
    ("vllm_config", "model"),
)
V2_MODEL_STATE = Internal(
    "vllm.v1.worker.gpu.model_states.interface:ModelState",
    "learn of requests and steps under Model Runner V2 (add_request, remove_request, prepare_inputs)",
)
V2_ADD_REQUEST = Internal(
    V2_MODEL_STATE.path + ".add_request", "see a request arrive", ("self", "req_index", "new_req_data")
)
V2_REMOVE_REQUEST = Internal(V2_MODEL_STATE.path + ".remove_request", "see a request leave", ("self", "req_id"))
V2_PREPARE_DUMMY = Internal(
    V2_MODEL_STATE.path + ".prepare_dummy_inputs", "steer nothing in a dummy step", ("self", "num_reqs", "num_tokens")
)
V2_PREPARE_INPUTS = Internal(
    V2_MODEL_STATE.path + ".prepare_inputs", "see a step", ("self", "input_batch", "req_states")
)
V2_BATCH = Internal(
    "vllm.v1.worker.gpu.input_batch:InputBatch",
    "learn which request owns which token of a step",
    reads=("req_ids", "query_start_loc_np", "num_computed_tokens_np"),
)
V2_REQUEST = Internal(
    "vllm.v1.core.sched.output:NewRequestData",
    "see what a request asks for",
    reads=("req_id", "sampling_params", "prompt_len"),
)
BIND_CAPTURER = Internal(
    "vllm.model_executor.layers.fused_moe.routed_experts_capturer:bind_routed_experts_capturer",
    "be handed the selected expert ids of every MoE layer, for counting",
    ("model", "capturer"),
)
MOE_RUNNER = Internal(
    "vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner",
    "find what selects in each layer, whether its kernel does so by itself, and on whose tokens",
    reads=(
        "_fse_fuse_gate",
        "do_naive_dispatch_combine",
        "is_monolithic",
        "layer_id",
        "moe_config",
        "routed_experts",
        "router",
    ),
)
MOE_CONFIG = Internal(
    "vllm.model_executor.layers.fused_moe.config:FusedMoEConfig",
    "see of how many experts a layer selects how many, and whether each rank of a tensor-parallel group has tokens of "
    "its own there",
    reads=("num_logical_experts", "experts_per_token", "is_sequence_parallel", "routing_method"),
)
MOE_CONFIG_INIT = Internal(
    MOE_CONFIG.path + ".__post_init__",
    "have layers not say which routing they use (replaced while a model is built, by the setting external_routing)",
    ("self",),
)
ROUTING_METHODS = Internal(
    "vllm.model_executor.layers.fused_moe.config:RoutingMethodType",
    "know which routings kernels of vLLM take over",
    reads=("DeepSeekV3", "MiniMax2", "Sigmoid", "SigmoidRenorm", "Unspecified"),
)
TP_RANK = Internal(
    "vllm.distributed.parallel_state:get_tensor_model_parallel_rank",
    "know which share of a step's tokens a sequence-parallel layer has here",
    (),
)
ELEMENTS_TO_LOAD = "weight_loader_numel"
"""Attribute of a tensor: how many of its elements come from a checkpoint."""
LOAD_NUMEL = Internal(
    "vllm.model_executor.model_loader.reload.utils:get_tensor_load_numel",
    f"keep reload_weights from looking for the plugin's buffers in a checkpoint (reads {ELEMENTS_TO_LOAD})",
    ("tensor",),
)
LORA_LAYER = Internal(
    "vllm.lora.layers.replicated_linear:ReplicatedLinearWithLoRA",
    "know whether the layer that an adapter shifts is a gate",
    reads=("base_layer",),
)
LORA_APPLY = Internal(
    LORA_LAYER.path + ".apply",
    "rewrite a gate's logits after the LoRA adapter has shifted them",
    ("self", "x", "bias"),
    wrapped=True,
)
LORA_ADD = Internal(LORA_LAYER.path + "._apply_lora_to_output", "add the adapter's part", ("self", "x", "output"))
_UNLOADED = "build a model without its weights, to say which kernels it would use here"
ENGINE_ARGS = Internal("vllm.engine.arg_utils:EngineArgs", _UNLOADED, reads=("create_engine_config",))
SET_CONFIG = Internal("vllm.config:set_current_vllm_config", _UNLOADED, ("vllm_config",))
INIT_DISTRIBUTED = Internal(
    "vllm.distributed.parallel_state:init_distributed_environment",
    _UNLOADED,
    ("world_size", "rank", "distributed_init_method", "local_rank", "backend"),
)
INIT_PARALLEL = Internal(
    "vllm.distributed.parallel_state:ensure_model_parallel_initialized",
    _UNLOADED,
    ("tensor_model_parallel_size", "pipeline_model_parallel_size"),
)
BUILD_MODEL = Internal("vllm.model_executor.model_loader.utils:initialize_model", _UNLOADED, ("vllm_config",))
ROUTING = Internal(
    "vllm.model_executor.layers.fused_moe.router.base_router:BaseRouter._compute_routing",
    "bias the logits that a router gets, in place, and correct what it selected, before ids are captured and mapped to "
    "physical experts (on each router object that is bound, not on the class)",
    ("self", "hidden_states", "router_logits", "indices_type", "input_ids"),
)
_WEIGHTED = ("scoring_func", "renormalize")
_BIASED = (*_WEIGHTED, "e_score_correction_bias", "routed_scaling_factor")
_GROUPED = (*_BIASED, "num_expert_group", "topk_group", "global_num_experts")
_CUSTOM = ("custom_routing_function", "renormalize")
_KIND = "know what a layer's router selects and how it weighs it"
FUSED_TOP_K = Internal(
    "vllm.model_executor.layers.fused_moe.router.fused_topk_router:FusedTopKRouter", _KIND, reads=_WEIGHTED
)
FUSED_TOP_K_BIAS = Internal(
    "vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router:FusedTopKBiasRouter",
    _KIND,
    reads=(*_BIASED, "_hash_indices_table", "bias_vl", "num_fused_shared_experts"),
)
GROUPED_TOP_K = Internal(
    "vllm.model_executor.layers.fused_moe.router.grouped_topk_router:GroupedTopKRouter",
    _KIND,
    reads=(*_GROUPED, "num_fused_shared_experts"),
)
CUSTOM_ROUTING = Internal(
    "vllm.model_executor.layers.fused_moe.router.custom_routing_router:CustomRoutingRouter", _KIND, reads=_CUSTOM
)
CPU_ROUTER = Internal(
    "vllm.model_executor.layers.fused_moe.router.cpu_router:CPURouter",
    _KIND,
    reads=(*_GROUPED, *_CUSTOM, "use_grouped_topk", "_hash_indices_table"),
)
V1_METHODS = (V1_PREPARE_INPUTS.name, V1_DUMMY_RUN.name)
"""The methods of Model Runner V1 that are wrapped."""
