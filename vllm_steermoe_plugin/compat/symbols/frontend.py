"""What is touched where requests come in: `LLM`, `AsyncLLM`, and their input processor."""

from __future__ import annotations

from vllm_steermoe_plugin.compat.internal import Internal

INPUT_PROCESSOR = Internal(
    "vllm.v1.engine.input_processor:InputProcessor", "read the engine's configuration", reads=("vllm_config",)
)
INPUT_PROCESSOR_INIT = Internal(
    INPUT_PROCESSOR.path + ".__init__",
    "make the front end of an engine, before its other processes start",
    ("self",),
    wrapped=True,
)
PROCESS_INPUTS = Internal(
    INPUT_PROCESSOR.path + ".process_inputs",
    "check a request, resolve its steering and salt the prefix cache before it runs",
    ("self", "request_id", "prompt", "params"),
    wrapped=True,
)
SAMPLING_PARAMS = Internal(
    "vllm:SamplingParams",
    "see what a request asks for, and of how many answers; write what is resolved; tell a step of beam search",
    reads=("extra_args", "max_tokens", "n", "num_logprobs", "skip_clone"),
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
LLM_ENGINE_INIT = Internal(
    LLM_ENGINE.path + ".__init__",
    "know in-process use from a server; ask the workers whether they steer",
    ("self",),
    wrapped=True,
)
LLM_ENGINE_ABORT = Internal(
    LLM_ENGINE.path + ".abort_request",
    "drop what an interrupted detection has sent",
    ("self", "request_ids", "internal"),
)
ASYNC_LLM = Internal(
    "vllm.v1.engine.async_llm:AsyncLLM",
    "reach the front end and the engines of a server",
    reads=("input_processor", "engine_core"),
)
ASYNC_LLM_TASKS = Internal(
    ASYNC_LLM.path + ".get_supported_tasks",
    "ask the workers whether they steer (vLLM awaits it before it builds a server and before it processes a request)",
    ("self",),
    wrapped=True,
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
OFFLINE_BEAMS = Internal(
    "vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin.beam_search",
    "tell a step of beam search in this process by its sampling parameters",
    ("self", "prompts", "params"),
    mentions=("logprobs", "max_tokens", "skip_clone"),
)
VALIDATION_ERROR = Internal(
    "vllm.exceptions:VLLMValidationError", "refuse a request with HTTP 400", ("message", "parameter")
)
SERVER_ERROR = Internal(
    "vllm.exceptions:GracefulHTTPError",
    "refuse a request with HTTP 500 where the operator is at fault, in words that reach the caller",
    ("message", "http_status"),
)
