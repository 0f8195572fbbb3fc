"""Detection: run both sides of the pairs through the engine, count the selected experts, make a ranking."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_registry import ExampleSums, ModelRef, Ranking
from expert_registry.errors import ConfigurationError, UsageError
from vllm_steermoe_plugin.detection.card import check_described, counting_notes, detection_card
from vllm_steermoe_plugin.detection.engine_client import COUNT_GROUPS, count_groups, routers
from vllm_steermoe_plugin.detection.loop import DetectionLoop, DetectionOptions
from vllm_steermoe_plugin.detection.pair_counting import SIDES
from vllm_steermoe_plugin.detection.pairs import PairsError, PairSet
from vllm_steermoe_plugin.detection.progress_file import Checkpoint, Progress, ResumeError, digest_of
from vllm_steermoe_plugin.detection.recipes.recipe import Behaviour
from vllm_steermoe_plugin.detection.tokenizer import offset_tokenizer
from vllm_steermoe_plugin.models.architectures import shape_of
from vllm_steermoe_plugin.models.checkpoints import fingerprint_of, revision_of

if TYPE_CHECKING:
    from vllm import LLM


def detect(
    engine: LLM,
    model_id: str,
    pairs: PairSet,
    behaviour: Behaviour,
    revision: str = "",
    options: DetectionOptions | None = None,
) -> Ranking:
    """Count the routing of both sides of `pairs` in a running engine and rank the experts.

    Each text is one prompt in vLLM's normal batches; the counted positions are counted on the
    device, from the experts that the router really selected. What is kept of them does not grow with the pairs.
    Pairs of one cluster are counted one after another, and are one example for the statistics.

    Args:
        engine: started with the setting `count_groups`, best `COUNT_GROUPS` (see `start_engine`).
        model_id: name under which the ranking will be looked up.
        pairs: the positive side shows the behaviour.
        behaviour: goes into the ranking card.
        revision: of the checkpoint; by default what is known of the engine's.
        options: see there.

    Raises:
        UsageError: the model's name or the behaviour cannot stand in a card, or there are not more experts than
            `stop_when_stable`.
        PairsError: a pair cannot be counted.
        ResumeError: the checkpoint is damaged, or of another detection.
        EngineError: the model has no routed experts that can be counted (UnsupportedModelError), the engine does not
            count (ConfigurationError), or its tokenizer gives no character offsets (UnsupportedFeatureError).
    """
    options = options or DetectionOptions()
    pairs = pairs.grouped()
    check_described(model_id, behaviour, pairs)
    config = engine.llm_engine.vllm_config.model_config
    shape = shape_of(config.hf_config, config.architecture)
    groups = count_groups(engine)
    if groups < SIDES:
        raise ConfigurationError(
            f"this engine counts {groups} groups; start it with the setting 'count_groups' at {COUNT_GROUPS}"
        )
    most = len(shape.layers) * shape.num_experts
    if options.stop_when_stable is not None and not 1 <= options.stop_when_stable < most:
        raise UsageError(f"stop_when_stable={options.stop_when_stable}: the first 1 to {most - 1} of {most} experts")
    tokenizer = offset_tokenizer(engine)
    sums = ExampleSums(len(shape.layers), shape.num_experts, permutations=options.permutations, seed=options.seed)
    # transformers keeps the commit of what it loads from the hub.
    revision = revision or getattr(config.hf_config, "_commit_hash", None) or revision_of(config.model)
    progress = Progress(sums, list(pairs.skipped))
    checkpoint = None
    if options.checkpoint is not None:
        digest = _digest(model_id, revision, config, tokenizer, pairs, options)
        checkpoint = Checkpoint(options.checkpoint, digest, options.checkpoint_every)
        if progress.resume(checkpoint):
            if len(progress.skipped) > len(pairs.skipped) and not options.skip_bad:
                raise ResumeError(
                    f"{checkpoint.path} left out bad pairs; ask for that again, or remove it to start anew"
                )
            options.report(f"going on from {checkpoint.path}: {progress.done} of {len(pairs.pairs)} pairs are counted")
    engine.collective_rpc("steermoe_reset_counts")
    stopped = DetectionLoop(engine, shape, pairs, options, progress, checkpoint).run(f"count {behaviour.name}")
    if not sums.pairs:
        raise PairsError(f"{pairs.name}: no pair is left to count; the first bad one: {progress.skipped[0]}")
    counts = sums.counts(shape.layers)
    counts.check(shape)
    card = detection_card(
        ModelRef(id=model_id, revision=revision, architecture=shape.architecture),
        shape,
        behaviour,
        pairs,
        counted=sums.pairs,
        balance=options.balance,
        notes=counting_notes(
            str(config.dtype).rpartition(".")[2],
            bool(tokenizer.chat_template),
            routers(engine),
            progress,
            pairs,
            options,
            stopped,
        ),
    )
    return Ranking(counts, card, sums.summary())


def _digest(
    model_id: str, revision: str, config: Any, tokenizer: Any, pairs: PairSet, options: DetectionOptions
) -> str:
    # Not only the file's hash: how its lines are read depends on more than the file.
    read = hashlib.sha256()
    for pair in pairs.pairs:
        read.update(hashlib.sha256(repr(pair).encode()).digest())
    # Not `skip_bad`: what was counted before a bad pair is found is the same either way.
    asked = (options.balance, options.permutations, options.seed)
    loaded = (config.model, config.revision, config.dtype, config.quantization, config.max_model_len)
    encoded = (config.tokenizer, config.tokenizer_revision, tokenizer.chat_template)
    # What a folder holds may have been written anew meanwhile.
    files = [fingerprint_of(Path(folder)) for folder in (config.model, config.tokenizer)]
    described = config.hf_config.to_dict()
    return digest_of(model_id, revision, loaded, encoded, files, described, read.hexdigest(), asked)
