"""One engine in a process of its own, which answers JSON lines; started by `engine_process.py`."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

REPLY = "REPLY "
"""Stands before a reply, since vLLM prints too."""


def serve_lines() -> None:
    """Start the engine that the first line describes, then do what each further line says."""
    engine, about = start(json.loads(sys.stdin.readline()))
    reply(about)
    for line in sys.stdin:
        command = json.loads(line)
        reply(generate(engine, **command) if "prompts" in command else read(engine))


def reply(value: dict[str, Any]) -> None:
    """Answer with one line."""
    print(REPLY + json.dumps(value), flush=True)  # noqa: T201


def start(description: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The engine, and what the driver must know of it."""
    import torch
    from vllm import LLM

    from vllm_steermoe_plugin.engine import engine_options, start_engine
    from vllm_steermoe_plugin.models.architectures import shape_of

    model, settings, options = description["model"], description["settings"], description["options"]
    if settings is None:
        plain = engine_options(model, None, **options)
        del plain["additional_config"]
        engine = LLM(**plain)
    else:
        engine = start_engine(model, settings, **options)
    config = engine.llm_engine.vllm_config
    shape = shape_of(config.model_config.hf_config, config.model_config.architecture)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return engine, {
        "gpu": gpu,
        "layers": list(shape.layers),
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "vocabulary": config.model_config.hf_text_config.vocab_size,
        "runner": "V2" if config.use_v2_model_runner else "V1",
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "workers": config.parallel_config.world_size,
    }


def generate(
    engine: Any,
    prompts: list[list[int]],
    arguments: list[dict[str, str] | None],
    new_tokens: int,
    logprobs: int | None,
    text: bool,
) -> dict[str, Any]:
    """Generate `new_tokens` for each prompt with its `extra_args`; greedy, and never ended early."""
    from vllm import SamplingParams
    from vllm.compilation.counter import compilation_counter

    params = [
        SamplingParams(
            temperature=0,
            max_tokens=new_tokens,
            ignore_eos=True,
            logprobs=logprobs,
            detokenize=text,
            extra_args=each,
        )
        for each in arguments
    ]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    started = time.perf_counter()
    outputs = engine.generate(inputs, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    chosen = [output.outputs[0] for output in outputs]
    return {
        "seconds": seconds,
        "tokens": [list(one.token_ids) for one in chosen],
        # As text, so that equal means equal bit for bit.
        "logprobs": [
            [sorted((token, repr(value.logprob)) for token, value in at.items()) for at in one.logprobs or ()]
            for one in chosen
        ],
        "graphs": compilation_counter.num_cudagraph_captured,
    }


def read(engine: Any) -> dict[str, Any]:
    """Steered requests that each worker has seen, and the routing counts if there are any."""
    from vllm_steermoe_plugin.detection.engine_client import count_groups, take_counts

    status = engine.collective_rpc("steermoe_status")
    value: dict[str, Any] = {"steered_requests": [each["steered_requests"] for each in status]}
    if count_groups(engine):
        layers = tuple(sorted({layer for each in status for layer in each["layers"]}))
        selections, tokens = take_counts(engine, layers)
        value |= {"selections": selections[0].tolist(), "tokens": int(tokens[0])}
    return value


if __name__ == "__main__":
    serve_lines()
