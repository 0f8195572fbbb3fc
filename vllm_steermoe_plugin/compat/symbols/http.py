"""What is touched of vLLM's HTTP server, and of `vllm run-batch`, which has none."""

from __future__ import annotations

from vllm_steermoe_plugin.compat.internal import Internal

BUILD_MIDDLEWARE = Internal(
    "vllm.entrypoints.launchers.app:init_entrypoints_middleware",
    "put the check of bodies behind vLLM's own middleware (in the module that builds the app, which has its name)",
    ("args", "app"),
    wrapped=True,
)
BATCH_LINE = Internal(
    "vllm.entrypoints.launchers.run_batch:handle_endpoint_request",
    "refuse a line of `vllm run-batch` whose steering would be dropped (the function that handles a line)",
    ("request",),
    wrapped=True,
)
BATCH_REQUEST = Internal(
    "vllm.entrypoints.launchers.run_batch:BatchRequestInput",
    "see what a line asks for, and where",
    reads=("body", "url"),
)
BATCH_ERROR = Internal(
    "vllm.entrypoints.launchers.run_batch:make_async_error_request_output",
    "write a refusal as the answer to a line",
    ("request", "error_msg"),
)
ANSWER_ERROR = Internal(
    "vllm.entrypoints.serve.exception_handling.error_response:create_error_response",
    "write a refusal as vLLM's server writes errors",
    ("message",),
)
ENGINE_CLIENT = Internal(
    "vllm.entrypoints.serve.instrumentator.health:engine_client",
    "ask the front end of a server's engine before a streamed answer begins; None on a server without an engine",
    ("request",),
)
ENDPOINT_PLUGIN = Internal(
    "vllm.plugins.endpoint_plugins.interface:EndpointPlugin", "add HTTP routes for the operator (implemented)"
)
ATTACH_ROUTER = Internal(
    ENDPOINT_PLUGIN.path + ".attach_router", "add them (the app's state has the server's args)", ("self", "app")
)
INIT_STATE = Internal(
    ENDPOINT_PLUGIN.path + ".init_state",
    "be handed the engine client, whose input_processor has the front end",
    ("self", "engine_client", "state", "args"),
)
SERVER_ARGS = Internal(
    "vllm.engine.arg_utils:AsyncEngineArgs", "know the settings of a server there", reads=("additional_config",)
)
FRONT_END_ARGS = Internal(
    "vllm.entrypoints.common.cli_args:FrontendArgs",
    "refuse an operator's key that the model's callers have",
    reads=("api_key",),
    formerly="vllm.entrypoints.launchers.cli_args:FrontendArgs",
)
