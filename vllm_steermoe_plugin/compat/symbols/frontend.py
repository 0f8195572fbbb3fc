"""What is touched where requests come in: `LLM`, `AsyncLLM`, and their input processor."""

from __future__ import annotations

from vllm_steermoe_plugin.compat.internal import Internal

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
