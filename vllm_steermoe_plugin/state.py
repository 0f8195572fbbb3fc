"""The steering state of one worker: which request is steered how, and the buffers that the graph reads.

It knows torch but not vLLM. A model runner's adapter tells it, before each step, which
requests are in the batch; the operators in `ops.py` read its buffers. Nothing here waits
for the device while requests are served: `step_buffers.py` says how a step reaches it.

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
from numpy.typing import NDArray

from expert_registry.errors import EngineError
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.counting import COUNT_KEY, CountedSpans
from vllm_steermoe_plugin.profile import SteeringProfile
from vllm_steermoe_plugin.request import STEER_KEY
from vllm_steermoe_plugin.rules import RuleTable, compile_rules
from vllm_steermoe_plugin.staging import Carrier
from vllm_steermoe_plugin.step_buffers import StepBuffers, Table


class BatchRow(NamedTuple):
    """One request's share of a step: `num_tokens` tokens from `first_position` on."""

    request_id: str
    first_position: int
    num_tokens: int


_REMEMBERED_IDS = 1 << 16
"""Requests of which it is remembered that they were counted, or how far. A preempted request is dropped like one that
has ended, and is the first to go on, long before as many others have come."""


@dataclass(slots=True)
class _Request:
    extra_args: Mapping[str, object] | None
    rules: RuleTable | None
    counted: CountedSpans | None
    num_prompt_tokens: int


class SteeringState:
    """Rules by slot, slots by token, and counters; see the module.

    Slot 0 has no rule. There is a slot for each request that can be in a batch, so slots
    cannot run out: a profile keeps its slot while it is used and loses it only to a
    profile of a later step that needs one.
    """

    def __init__(
        self,
        shape: MoEShape,
        layers: Sequence[int],
        *,
        max_requests: int,
        max_tokens: int,
        count_groups: int,
        device: torch.device,
        carrier: Carrier | None = None,
    ) -> None:
        """Allocate the buffers, once, and on a GPU compile the kernels that read them.

        Args:
            shape: of the whole model.
            layers: checkpoint indices of the L MoE layers on this worker.
            max_requests: requests in one step at most.
            max_tokens: tokens in one step at most, padding included.
            count_groups: G; 0 for no counting.
            device: of the model.
            carrier: brings a step's buffers to the device; by default pinned memory for a GPU.
        """
        self.shape = shape
        self.layers = tuple(layers)
        self._rows = [shape.layers.index(layer) for layer in self.layers]
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
        self.token_slots = self.buffers.token_slots
        self.token_groups = self.buffers.token_groups
        # Read, and written, on the CPU only.
        self.active = torch.zeros(len(self.layers), dtype=torch.bool, device=device)
        self._active = self.active.numpy() if device.type == "cpu" else np.zeros(len(self.layers), dtype=np.bool_)
        self.counters = torch.zeros(
            (len(self.layers), count_groups + 1, shape.num_experts), dtype=torch.int64, device=device
        )
        self.counted_tokens = np.zeros(count_groups + 1, dtype=np.int64)
        self.steered_requests = 0
        self._requests: dict[str, _Request] = {}
        self._marked: set[str] = set()
        # Requests keep their table; this only spares compiling a popular profile again.
        self._table = lru_cache(maxsize=1024)(self._compile)
        self._counted_ids: OrderedDict[str, None] = OrderedDict()
        self._slot_of: dict[str, int] = {}
        self._active_of = np.zeros((max_requests + 1, len(self.layers)), dtype=np.bool_)
        self._counted_until: OrderedDict[str, int] = OrderedDict()
        if device.type == "cuda":
            from vllm_steermoe_plugin.kernels.warm_up import warm_up

            warm_up(self.rules, self.token_slots, self.counters, self.token_groups, shape.top_k)

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
        if counted is not None and counted.last_group >= self.counters.shape[1]:
            raise EngineError(
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
        return self.counters.shape[1] - 1

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
        placed, new_tables = self._place(tables)
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
                    self._mark(groups[start : start + row.num_tokens], row, request.counted)
                start += row.num_tokens
        # Should the device fail in between, no slot counts as written.
        self._slot_of = {}
        self.buffers.write(slots, groups, new_tables)
        self._slot_of = placed
        self._active[:] = self._active_of[list(slot_of.values())].any(axis=0)

    def clear_step(self) -> None:
        """Steer and count nothing in the next forward pass (dummy runs, batches without steering)."""
        self.buffers.clear()
        self._active[:] = False

    def read_counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Selections int64 `[G, L, E]` and counted tokens int64 `[G]` since the last reset.

        Raises:
            EngineError: the selections do not sum to top-k per counted token, so something was
                counted that should not have been, or the reverse.
        """
        selections = self.counters.cpu().numpy().transpose(1, 0, 2)[1:].copy()
        tokens = self.counted_tokens[1:].copy()
        expected = tokens[:, None] * self.shape.top_k
        if not np.array_equal(selections.sum(axis=2), np.broadcast_to(expected, selections.shape[:2])):
            raise EngineError(
                f"routing counts are inconsistent: {tokens.tolist()} counted tokens per group with "
                f"top-{self.shape.top_k}, but selections per layer are {selections.sum(axis=2).tolist()}"
            )
        return selections, tokens

    def reset_counts(self) -> None:
        """Start counting anew."""
        self.counters.zero_()
        self.counted_tokens[:] = 0
        self._counted_until.clear()

    def _compile(self, text: str) -> RuleTable:
        return compile_rules(SteeringProfile.from_json(text), self.shape)

    def _count_steered(self, request_id: str) -> None:
        """Count a request once: Model Runner V2 drops a preempted one and announces it again."""
        if request_id not in self._counted_ids:
            self.steered_requests += 1
            self._counted_ids[request_id] = None
            if len(self._counted_ids) > _REMEMBERED_IDS:
                self._counted_ids.popitem(last=False)

    def _place(self, needed: Mapping[str, RuleTable]) -> tuple[dict[str, int], list[Table]]:
        """Slots by digest once this step is written, and the rules of its profiles that had none."""
        missing = [digest for digest in needed if digest not in self._slot_of]
        if not missing:
            return self._slot_of, []
        placed = dict(self._slot_of)
        new: list[Table] = []
        taken = set(placed.values())
        free = [slot for slot in range(self.rules.shape[0] - 1, 0, -1) if slot not in taken]
        idle = [digest for digest in placed if digest not in needed]
        for digest in missing:
            slot = free.pop() if free else placed.pop(idle.pop(0))
            local = needed[digest].rules[self._rows]
            new.append((slot, local))
            self._active_of[slot] = local.any(axis=1)
            placed[digest] = slot
        return placed, new

    def _mark(self, groups: NDArray[np.int32], row: BatchRow, counted: CountedSpans) -> None:
        """Mark the tokens of a row that are to be counted.

        A preempted request computes its tokens again; each position counts once.
        """
        begin = max(row.first_position, self._counted_until.get(row.request_id, 0))
        end = row.first_position + row.num_tokens
        before = 0
        for start, stop in counted.ranges:
            low, high = max(start, begin), min(stop, end)
            if low < high:
                first = counted.group + before + low - start
                into = np.arange(first, first + high - low) if counted.each else counted.group
                groups[low - row.first_position : high - row.first_position] = into
                self.counted_tokens[into] += 1 if counted.each else high - low
            before += stop - start
        self._counted_until[row.request_id] = max(end, begin)
        self._counted_until.move_to_end(row.request_id)
        if len(self._counted_until) > _REMEMBERED_IDS:
            self._counted_until.popitem(last=False)
