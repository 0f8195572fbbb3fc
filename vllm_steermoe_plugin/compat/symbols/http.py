"""What is touched of vLLM's HTTP server."""

from __future__ import annotations

from vllm_steermoe_plugin.compat.internal import Internal

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
