"""The steering state of one worker: which request is steered how, and the buffers that the graph reads.

It knows torch but not vLLM. A model runner's adapter tells it, before each step, which
requests are in the batch; the operators in `device/ops.py` read its buffers. Nothing here waits
for the device while requests are served: `device/step_buffers.py` says how a step reaches it,
`device/rule_slots.py` where its rules lie there, `device/routing_counters.py` what is counted.

Each rank of a parallel engine has a state of its own, with the layers it runs. Rules and counts
use the checkpoint's expert numbers everywhere: expert parallelism and vLLM's load balancing
(EPLB) come after a router's choice, and logits, top-k and captured ids know nothing of them.

Axes: T tokens of a step, S slots, L MoE layers of this worker, E experts, G groups.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import KeysView, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from expert_registry.errors import ConfigurationError, EngineError
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.device.routing_counters import REMEMBERED_IDS, Counters
from vllm_steermoe_plugin.device.rule_slots import Slots
from vllm_steermoe_plugin.device.staging_ring import Carrier
from vllm_steermoe_plugin.device.step_buffers import StepBuffers
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans
from vllm_steermoe_plugin.steering.profile import SteeringProfile
from vllm_steermoe_plugin.steering.rules import RuleTable, compile_rules
from vllm_steermoe_plugin.steering.wire import COUNT_KEY, STEER_KEY


class BatchRow(NamedTuple):
    """One request's share of a step: `num_tokens` tokens from `first_position` on."""

    request_id: str
    first_position: int
    num_tokens: int


@dataclass(slots=True)
class _Request:
    extra_args: Mapping[str, object] | None
    rules: RuleTable | None
    counted: CountedSpans | None
    num_prompt_tokens: int


class SteeringState:
    """The requests of a worker, and what a step of some of them is in the buffers; see the module."""

    def __init__(
        self,
        shape: MoEShape,
        layers: Sequence[int],
        *,
        max_requests: int,
        max_tokens: int,
        count_groups: int,
        device: torch.device,
        routers: Sequence[str] = (),
        corrects: bool = False,
        carrier: Carrier | None = None,
    ) -> None:
        """Allocate the buffers, once.

        Args:
            shape: of the whole model.
            layers: checkpoint indices of the L MoE layers on this worker.
            max_requests: requests in one step at most.
            max_tokens: tokens in one step at most, padding included.
            count_groups: G; 0 for no counting.
            device: of the model.
            routers: what its routers do and where they are steered, in words.
            corrects: whether it is by the correction of a selection, in any layer.
            carrier: brings a step's buffers to the device; by default pinned memory for a GPU.
        """
        self.shape = shape
        self.layers = tuple(layers)
        self.routers, self.corrects = tuple(routers), corrects
        self.buffers = StepBuffers(
            max_requests + 1,
            len(self.layers),
            shape.num_experts,
            max_tokens,
            counting=count_groups > 0,
            device=device,
            carrier=carrier,
        )
        self.rules = self.buffers.rules
        self.active = self.buffers.active
        self.token_slots = self.buffers.token_slots
        self.token_groups = self.buffers.token_groups
        self.counts = Counters(len(self.layers), count_groups, shape.num_experts, shape.top_k, device)
        self.counters = self.counts.selections
        self.steered_requests = 0
        self._requests: dict[str, _Request] = {}
        self._marked: set[str] = set()
        # Requests keep their table; this only spares compiling a popular profile again.
        self._table = lru_cache(maxsize=1024)(self._compile)
        self._counted_ids: OrderedDict[str, None] = OrderedDict()
        self._slots = Slots(max_requests, [shape.layers.index(layer) for layer in self.layers])

    def slots_of(self, sequence_rank: int, logits: torch.Tensor) -> torch.Tensor:
        """Slots of the tokens that this process routes in a layer, from that of the first row of `logits [T, E]` on.

        Args:
            sequence_rank: which share of the step it has: in a sequence-parallel layer each rank has as many rows as
                the others, padding included; 0 elsewhere.
            logits: of the layer.
        """
        return self.token_slots[sequence_rank * len(logits) :] if sequence_rank else self.token_slots

    @property
    def num_requests(self) -> int:
        """Requests admitted and not forgotten."""
        return len(self._requests)

    @property
    def idle(self) -> bool:
        """Whether no admitted request is steered or counted, so that every step leaves the model as it is."""
        return not self._marked

    def known_requests(self) -> KeysView[str]:
        """Ids of the requests that were admitted and not forgotten."""
        return self._requests.keys()

    def admit(self, request_id: str, extra_args: Mapping[str, object] | None, num_prompt_tokens: int) -> None:
        """Take note of a request before its first step; a second call with the same arguments changes nothing.

        Raises:
            SteerMoEError: what it asks for cannot be done here. The front end has checked it, so
                this stops a request that came past the front end.
        """
        known = self._requests.get(request_id)
        # Identity, not the id alone: an id may come again with another request.
        if known is not None and known.extra_args is extra_args:
            return
        args = extra_args or {}
        steer = args.get(STEER_KEY)
        if steer is not None and not isinstance(steer, str):
            raise EngineError(f"a worker takes steering as JSON text, got {type(steer).__name__}")
        rules = None if steer is None else self._table(steer)
        counted = None if args.get(COUNT_KEY) is None else CountedSpans.from_json(args[COUNT_KEY])
        if counted is not None and counted.last_group > self.groups:
            raise ConfigurationError(
                f"group {counted.last_group} is not counted here; setting 'count_groups' is {self.groups}"
            )
        if rules is not None:
            self._count_steered(request_id)
        if rules is not None or counted is not None:
            self._marked.add(request_id)
        else:
            self._marked.discard(request_id)
        self._requests[request_id] = _Request(extra_args, rules, counted, num_prompt_tokens)

    def forget(self, request_id: str) -> None:
        """A request has ended or left the worker."""
        self._requests.pop(request_id, None)
        self._marked.discard(request_id)

    @property
    def groups(self) -> int:
        """G."""
        return self.counts.groups

    def device_buffers(self) -> dict[str, torch.Tensor]:
        """All memory on the device that outlives a step, to be registered as buffers of the model.

        vLLM's sleep mode gives the model's memory away, and at level 2 brings back only what is a registered buffer;
        without that, a step after waking up would read what another owner of the memory left there.
        """
        return {
            "rules": self.rules,
            "staging": self.buffers.staging.device_block,
            "groups": self.token_groups,
            "counters": self.counters,
        }

    def begin_step(self, batch: Sequence[BatchRow]) -> None:
        """Write the buffers for a step; `batch` is in the order of the tokens.

        Raises:
            EngineError: a request was not admitted.
        """
        # This runs before every step with something to do, so it does little for each request.
        rows: list[tuple[BatchRow, _Request]] = []
        tables: dict[str, RuleTable] = {}
        counted = False
        for row in batch:
            request = self._requests.get(row.request_id)
            if request is None:
                raise EngineError(f"request {row.request_id!r} is in the batch but was never admitted")
            rows.append((row, request))
            if request.rules is not None:
                tables[request.rules.digest] = request.rules
            if request.counted is not None:
                counted = True
        if not tables and not counted:
            self.clear_step()
            return
        placed, new_tables = self._slots.place(tables)
        slot_of = {digest: placed[digest] for digest in tables}
        # Runs of tokens in the same slot.
        run_slots: list[int] = []
        run_lengths: list[int] = []
        for row, request in rows:
            rules = request.rules
            if rules is None:
                run_slots.append(0)
                run_lengths.append(row.num_tokens)
            elif rules.phase == "both":
                run_slots.append(slot_of[rules.digest])
                run_lengths.append(row.num_tokens)
            else:
                slot = slot_of[rules.digest]
                in_prompt = min(max(request.num_prompt_tokens - row.first_position, 0), row.num_tokens)
                run_slots += (slot, 0) if rules.phase == "prompt" else (0, slot)
                run_lengths += (in_prompt, row.num_tokens - in_prompt)
        slots = np.repeat(np.array(run_slots, dtype=np.int32), run_lengths)
        groups = np.zeros_like(slots)
        if counted:
            start = 0
            for row, request in rows:
                if request.counted is not None:
                    into = groups[start : start + row.num_tokens]
                    self.counts.mark(into, row.request_id, row.first_position, request.counted)
                start += row.num_tokens
        # Should the device fail in between, no slot counts as written.
        self._slots.written({})
        self.buffers.write(slots, groups, new_tables, self._slots.active_layers(slot_of.values()))
        self._slots.written(placed)

    def clear_step(self) -> None:
        """Steer and count nothing in the next forward pass (dummy runs, batches without steering)."""
        self.buffers.clear()

    def _compile(self, text: str) -> RuleTable:
        return compile_rules(SteeringProfile.from_json(text), self.shape)

    def _count_steered(self, request_id: str) -> None:
        """Count a request once: Model Runner V2 drops a preempted one and announces it again."""
        if request_id not in self._counted_ids:
            self.steered_requests += 1
            self._counted_ids[request_id] = None
            if len(self._counted_ids) > REMEMBERED_IDS:
                self._counted_ids.popitem(last=False)
