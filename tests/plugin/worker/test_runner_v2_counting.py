"""Counting on Model Runner V2, driven by vLLM's own scheduler: chunks, preemption, recomputation, the prefix cache.

The scheduler speaks as it does to that runner (a request that goes on after preemption is announced anew), and what
the runner does with its answer before each forward pass is done here in its order. The model is a table: which experts
a token gets depends on its id and position alone, so the reference needs no steps.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

from expert_registry.shape import MoEShape
from tests.plugin.worker.test_runner_v2 import PlainState
from vllm_steermoe_plugin.core.block_keys import keep_apart
from vllm_steermoe_plugin.device.ops import count_
from vllm_steermoe_plugin.device.steering_state import SteeringState
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans
from vllm_steermoe_plugin.steering.wire import COUNT_KEY, SHARED_KEY
from vllm_steermoe_plugin.worker.runners.v2 import with_steering

SHAPE = MoEShape("OlmoeForCausalLM", (0, 2), 6, 2)
CPU = torch.device("cpu")
STEP = 40
"""Tokens per step, fewer than most prompts have."""
PADDING = 5
REQUESTS = 14
BLOCK = 32


def experts_of(token: int, position: int, layer: int) -> list[int]:
    """What the router of a layer selects: top-k of the E experts, at random but always the same."""
    seed = hashlib.sha256(f"{token} {position} {layer}".encode()).digest()
    return random.Random(seed).sample(range(SHAPE.num_experts), SHAPE.top_k)


def counted_spans(chance: random.Random, group: int, lowest: int, prompt: int) -> CountedSpans:
    edges = sorted(chance.sample(range(lowest, prompt + 1), 2 * chance.randint(1, 3)))
    ranges = tuple(zip(edges[::2], edges[1::2], strict=True))
    return CountedSpans(group, ranges, each=chance.random() < 0.3)


class Run:
    """Requests through the scheduler and the adapter until all have ended."""

    def __init__(self, engine: Any, chance: random.Random, *, caching: bool) -> None:
        core = engine.llm_engine.engine_core.engine_core
        config = copy.copy(engine.llm_engine.vllm_config)
        config.cache_config = copy.copy(config.cache_config)
        config.cache_config.enable_prefix_caching = caching
        self.scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=core.scheduler.kv_cache_config,
            structured_output_manager=core.structured_output_manager,
            block_size=BLOCK,
            hash_block_size=BLOCK,
            log_stats=True,
        )
        self.scheduler.use_v2_model_runner = True
        self.scheduler.max_num_scheduled_tokens = STEP
        hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(hash_function)
        hasher = get_request_block_hasher(BLOCK, hash_function) if caching else None
        starts = [[chance.randrange(90) for _ in range(2 * BLOCK)] for _ in range(3)]
        self.requests: dict[str, Request] = {}
        self.counted: dict[str, CountedSpans] = {}
        group = 1
        for i in range(REQUESTS):
            start = chance.choice(starts)[: chance.choice((0, 40, 2 * BLOCK))]
            tokens = start + [chance.randrange(90) for _ in range(chance.randint(6, 30))]
            name, extra_args = f"r{i}", None
            if i % 5 != 4:
                lowest = chance.choice((0, len(start)))
                spans = self.counted[name] = counted_spans(chance, group, lowest, len(tokens))
                group = spans.last_group + 1
                extra_args = {COUNT_KEY: spans.to_json(), SHARED_KEY: [spans.ranges[0][0], name]}
            params = SamplingParams(max_tokens=chance.randint(2, 40), ignore_eos=True, extra_args=extra_args)
            self.requests[name] = Request(name, tokens, params, None, block_hasher=hasher)
            keep_apart(self.requests[name], extra_args, self.scheduler)  # As the engine's core does.
        self.groups = group - 1
        self.state = SteeringState(
            SHAPE, SHAPE.layers, max_requests=4, max_tokens=STEP + PADDING, count_groups=self.groups, device=CPU
        )
        self.model_state: Any = with_steering(PlainState, self.state)(None, torch.nn.Identity())
        self.computed: dict[str, int] = {}
        self.passes: dict[tuple[str, int], int] = {}
        """How often each position of each request went through the model."""
        self.preempted = self.chunked = self.found = 0

    def all(self) -> None:
        for request in self.requests.values():
            self.scheduler.add_request(request)
        while self.scheduler.has_unfinished_requests():
            self._step()
        self.preempted = sum(request.num_preemptions for request in self.requests.values())

    def _step(self) -> None:
        output = self.scheduler.schedule()
        # As GPUModelRunner of V2 does: what has ended or was preempted leaves, what is new or goes on comes.
        for name in sorted(output.finished_req_ids | (output.preempted_req_ids or set())):
            self.model_state.remove_request(name)
        for index, new in enumerate(output.scheduled_new_reqs):
            assert new.prefill_token_ids is not None
            self.model_state.remove_request(new.req_id)
            self.model_state.add_request(index, new)
            self.computed[new.req_id] = new.num_computed_tokens
            self.found += new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        self.computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        names = sorted(output.num_scheduled_tokens, key=output.num_scheduled_tokens.__getitem__)
        rows = [(name, self.computed[name], output.num_scheduled_tokens[name]) for name in names]
        self.model_state.prepare_inputs(self._batch(rows), None)
        self._forward(rows)
        sampled = []
        for name, first, number in rows:
            length = self.requests[name].num_tokens
            self.chunked += first + number < length
            sampled.append([] if first + number < length else [(7 * length) % 90])
        places = {name: index for index, name in enumerate(names)}
        self.scheduler.update_from_output(output, ModelRunnerOutput(names, places, sampled))

    def _batch(self, rows: list[tuple[str, int, int]]) -> InputBatch:
        tokens = [number for _, _, number in rows]
        buffers = InputBuffers(max_num_reqs=8, max_num_tokens=STEP + PADDING, device=CPU)
        made = InputBatch.make_dummy(len(rows), sum(tokens), buffers)
        made.req_ids = [name for name, _, _ in rows]
        made.num_computed_tokens_np = np.array([first for _, first, _ in rows], dtype=np.int32)
        made.query_start_loc_np = np.concatenate([[0], np.cumsum(tokens)]).astype(np.int32)
        made.num_tokens_after_padding = sum(tokens) + PADDING
        return made

    def _forward(self, rows: list[tuple[str, int, int]]) -> None:
        where = [(name, first + i) for name, first, number in rows for i in range(number)]
        for name, position in where:
            self.passes[name, position] = self.passes.get((name, position), 0) + 1
        for row, layer in enumerate(SHAPE.layers):
            chosen = [experts_of(self.requests[n].all_token_ids[p], p, layer) for n, p in where]
            padded = [*chosen, *([[0, 1]] * PADDING)]
            count_(torch.tensor(padded), self.state.counters, self.state.token_groups, row)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        selections = np.zeros((self.groups, len(SHAPE.layers), SHAPE.num_experts), dtype=np.int64)
        tokens = np.zeros(self.groups, dtype=np.int64)
        for name, spans in self.counted.items():
            positions = [p for start, stop in spans.ranges for p in range(start, stop)]
            for number, position in enumerate(positions):
                group = spans.group - 1 + (number if spans.each else 0)
                tokens[group] += 1
                for row, layer in enumerate(SHAPE.layers):
                    ids = self.requests[name].prompt_token_ids or []
                    for expert in experts_of(ids[position], position, layer):
                        selections[group, row, expert] += 1
        return selections, tokens


@pytest.mark.parametrize("caching", [False, True], ids=["no prefix cache", "prefix cache"])
def test_each_marked_token_is_counted_once(caching: bool, tight: Any) -> None:
    preempted = chunked = again = found = spared = 0
    for seed in range(20):
        run = Run(tight, random.Random(seed), caching=caching)
        run.all()
        selections, tokens = run.state.counts.read()
        expected, expected_tokens = run.expected()
        np.testing.assert_array_equal(tokens, expected_tokens)
        np.testing.assert_array_equal(selections, expected)
        preempted, chunked, found = preempted + run.preempted, chunked + run.chunked, found + run.found
        marked = [(n, p) for n, spans in run.counted.items() for a, b in spans.ranges for p in range(a, b)]
        again += sum(run.passes[place] > 1 for place in marked)
        # Tokens of prompts that no step has computed for their request.
        spared += sum((n, p) not in run.passes for n, r in run.requests.items() for p in range(r.num_prompt_tokens))
        assert run.state.num_requests <= 4, "requests that ended are forgotten"
    assert preempted > 0 and chunked > 0 and again > 0, "there must be what could count twice"
    assert (found > 0) == caching and (spared > 0) == caching


def test_a_scheduler_of_this_runner_announces_preempted_requests_anew(tight: Any) -> None:
    """What the other test rests on: otherwise it would not show recomputation as this runner sees it."""
    run = Run(tight, random.Random(0), caching=False)
    announced: list[str] = []
    schedule: Callable[[], Any] = run.scheduler.schedule

    def noted() -> Any:
        output = schedule()
        announced.extend(new.req_id for new in output.scheduled_new_reqs)
        return output

    run.scheduler.schedule = noted  # type: ignore[method-assign,assignment]
    run.all()
    assert run.preempted > 0 and len(announced) == REQUESTS + run.preempted
