"""Detection: run both sides of the pairs through the engine, count the selected experts, make a ranking."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import expert_registry
from expert_registry import DataRef, ModelRef, Ranking, RankingCard, Recommended, RoutingCounts
from vllm_steermoe_plugin.architectures import shape_of
from vllm_steermoe_plugin.counting import CountedSpans
from vllm_steermoe_plugin.engine import read_counts
from vllm_steermoe_plugin.pairs import PairsError, PairSet
from vllm_steermoe_plugin.progress import track
from vllm_steermoe_plugin.request import NONE
from vllm_steermoe_plugin.spans import SPAN_RULE, TokenSpan, encode_side
from vllm_steermoe_plugin.state import COUNT_KEY, STEER_KEY
from vllm_steermoe_plugin.versions import tool_versions

if TYPE_CHECKING:
    from vllm import LLM

SIDES = 2
CHUNK = 256
"""Texts handed to the engine at a time: enough to fill its batches, few enough for a lively progress bar."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What is being detected, for the ranking's card."""

    name: str
    sides: tuple[str, str]
    safety: bool
    recommended: Recommended
    license: str = "unspecified"
    note: str = ""
    version: int = 1


def detect(engine: LLM, model_id: str, pairs: PairSet, behaviour: Behaviour, revision: str = "") -> Ranking:
    """Count the routing of both sides of `pairs` in a running engine and rank the experts.

    Each text is one prompt in vLLM's normal batches; the counted positions are counted on the
    device, from the experts that the router really selected.

    Args:
        engine: started with the setting `count_groups` of at least 2 (see `start_engine`).
        model_id: name under which the ranking will be looked up.
        pairs: side 1 shows the behaviour.
        behaviour: goes into the card.
        revision: of the checkpoint.

    Raises:
        PairsError: a pair cannot be encoded or is longer than the context.
        EngineError: the engine does not count, or counted inconsistently.
    """
    config = engine.llm_engine.vllm_config.model_config
    shape = shape_of(config.hf_text_config)
    tokenizer = engine.get_tokenizer()
    texts: list[tuple[int, TokenSpan]] = []
    for pair in track(pairs.pairs, "tokenise"):
        for group, side in ((1, pair.side_1), (2, pair.side_2)):
            span = encode_side(side, tokenizer, f"{pair.origin}, side {group}")
            if len(span.token_ids) >= config.max_model_len:
                raise PairsError(
                    f"{pair.origin}, side {group}: {len(span.token_ids)} tokens, but the context holds "
                    f"{config.max_model_len} with the one that is generated"
                )
            texts.append((group, span))
    engine.collective_rpc("steermoe_reset_counts")
    chunks = [texts[i : i + CHUNK] for i in range(0, len(texts), CHUNK)]
    for chunk in track(chunks, f"count {behaviour.name}"):
        _count(engine, chunk)
    selections, tokens = read_counts(engine, shape.layers)
    counts = RoutingCounts(
        activations_1=selections[0],
        activations_2=selections[1],
        tokens=tokens[:SIDES],
        layers=np.asarray(shape.layers, dtype=np.int64),
    )
    counts.check(shape)
    card = RankingCard(
        model=ModelRef(id=model_id, revision=revision, architecture=shape.architecture),
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        behaviour=behaviour.name,
        version=behaviour.version,
        sides=behaviour.sides,
        data=DataRef(name=pairs.name, sha256=pairs.sha256, pairs=len(pairs.pairs)),
        span=SPAN_RULE,
        safety=behaviour.safety,
        recommended=behaviour.recommended,
        tools=tool_versions(),
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
        license=behaviour.license,
        note=behaviour.note,
    )
    return expert_registry.Ranking(counts, card)


def _count(engine: LLM, texts: Sequence[tuple[int, TokenSpan]]) -> None:
    """Prefill `texts`; the one token that vLLM must generate is not counted."""
    from vllm import SamplingParams

    prompts: list[Any] = [{"prompt_token_ids": list(span.token_ids)} for _, span in texts]
    params = [
        SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            extra_args={
                COUNT_KEY: CountedSpans(group, ((span.start, span.stop),)).to_json(),
                # An engine may have a default; detection looks at the model's own routing.
                STEER_KEY: NONE,
            },
        )
        for group, span in texts
    ]
    engine.generate(prompts, params, use_tqdm=False)
