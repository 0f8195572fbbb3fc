"""How a step reaches the device: one copy, none when nothing changed, and never into a copy's back."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugin.device.test_steering_state import MAX_TOKENS, SHAPE, arguments, expected_row, make_state, some_profile
from vllm_steermoe_plugin.device.staging_ring import RING_DEPTH, StagingRing
from vllm_steermoe_plugin.device.steering_state import BatchRow, SteeringState
from vllm_steermoe_plugin.device.step_buffers import ROWS_PER_COPY, StepBuffers, Table
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans
from vllm_steermoe_plugin.steering.rule_values import FORCES

CPU = torch.device("cpu")


class CopyInFlight:
    """A copy that a device will read some time later; its source must then be what it was when it was sent."""

    def __init__(self, source: torch.Tensor) -> None:
        self._source = source
        self._sent = source.clone()
        self.done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        assert torch.equal(self._source, self._sent), "a host block was written while a copy was reading it"
        self.done = True


class LaggingDevice:
    """Copies in the order in which they were sent, as far behind the host as a test lets it be.

    Targets are written at once, since all other work on the CPU is done at once too: what lags is the reading.
    """

    def __init__(self) -> None:
        self.copies: list[CopyInFlight] = []

    def allocate(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    def send(self, source: torch.Tensor, target: torch.Tensor) -> CopyInFlight:
        target.copy_(source)
        self.copies.append(CopyInFlight(source))
        return self.copies[-1]

    def catch_up(self, left: int = 0) -> None:
        """Read until only `left` copies are under way."""
        under_way = [copy for copy in self.copies if not copy.done]
        for copy in under_way[: len(under_way) - left]:
            copy.synchronize()


class ImpatientCopy(CopyInFlight):
    """Claims to be done: what a ring without events would believe."""

    def query(self) -> bool:
        return True


class ImpatientDevice(LaggingDevice):
    def send(self, source: torch.Tensor, target: torch.Tensor) -> CopyInFlight:
        target.copy_(source)
        self.copies.append(ImpatientCopy(source))
        return self.copies[-1]


def run_steps(state: SteeringState, device: LaggingDevice, seed: int, steps: int = 60) -> None:
    """Steps with changing requests and profiles; before each the device catches up a little, or not."""
    chance = random.Random(seed)
    for number in range(steps):
        batch = []
        for index in range(chance.randint(1, 4)):
            request = f"{number}-{index}"
            profile = some_profile(chance.randrange(40), "both") if chance.random() < 0.8 else None
            state.admit(request, arguments(profile), 1)
            batch.append((request, profile, chance.randint(1, 9)))
        device.catch_up(left=chance.randint(0, RING_DEPTH + 2))
        state.begin_step([BatchRow(request, 0, tokens) for request, _, tokens in batch])
        wanted = [expected_row(profile, SHAPE.layers, in_prompt=True) for _, profile, n in batch for _ in range(n)]
        wanted += [expected_row(None, SHAPE.layers, in_prompt=True)] * (MAX_TOKENS - len(wanted))
        assert state.rules[state.token_slots.long()].tolist() == wanted
        for request, _, _ in batch:
            state.forget(request)
    device.catch_up()


@given(st.integers(0, 1 << 32), st.sampled_from([0, 3]))
@settings(max_examples=20, deadline=None)
def test_a_copy_in_flight_is_never_overwritten(seed: int, groups: int) -> None:
    device = LaggingDevice()
    state = make_state(groups=groups, carrier=device)
    run_steps(state, device, seed)
    assert state.buffers.staging.copies == len(device.copies)


def test_the_host_waits_when_every_block_is_in_flight_and_only_then() -> None:
    device = LaggingDevice()
    ring = StagingRing(8, CPU, carrier=device)
    for number in range(RING_DEPTH + 3):
        ring.take()[:] = number
        ring.send(0, 8)
    assert ring.waits == 3 and [copy.done for copy in device.copies[:4]] == [True] * 3 + [False]
    device.catch_up()
    ring.take()
    assert ring.waits == 3


def test_without_events_the_test_above_would_fail() -> None:
    with pytest.raises(AssertionError, match="while a copy was reading it"):
        device = ImpatientDevice()
        run_steps(make_state(carrier=device), device, seed=1)


def test_unsteered_steps_copy_nothing_and_a_repeated_step_nothing_new() -> None:
    device = LaggingDevice()
    state = make_state(groups=0, carrier=device)
    state.admit("plain", None, 3)
    for position in range(5):
        state.begin_step([BatchRow("plain", position, 1)])
    assert device.copies == []
    state.admit("steered", arguments(some_profile(1, "both")), 3)
    decode = [BatchRow("plain", 5, 1), BatchRow("steered", 0, 1)]
    for _ in range(5):
        state.begin_step(decode)
    assert len(device.copies) == 1
    state.begin_step(decode[::-1])
    assert len(device.copies) == 2
    state.forget("steered")
    state.begin_step(decode[:1])
    assert len(device.copies) == 2 and not state.token_slots.any()
    state.token_slots[:] = 5
    state.begin_step(decode[:1])
    assert (state.token_slots == 5).all(), "the second unsteered step has nothing to do on the device"


def test_a_step_is_one_copy_whatever_is_new_in_it() -> None:
    device = LaggingDevice()
    state = make_state(max_requests=16, groups=2, carrier=device)
    for step in range(3):
        for index in range(16):
            spans = CountedSpans(1, ((0, 2),))
            state.admit(f"{step}-{index}", arguments(some_profile(100 * step + index, "both"), spans), 2)
        state.begin_step([BatchRow(f"{step}-{index}", 0, 2) for index in range(16)])
        assert len(device.copies) == step + 1


def test_any_number_of_new_rule_tables_arrives() -> None:
    for counting in [False, True]:
        for number in [0, 1, 63, 64, 65, 128, 130]:
            chance = np.random.default_rng(number)
            buffers = StepBuffers(200, 3, 5, MAX_TOKENS, counting=counting, device=CPU, carrier=LaggingDevice())
            tables: list[Table] = [
                (int(slot), chance.integers(-1, 2, (3, 5)).astype(np.float16))
                for slot in chance.choice(np.arange(1, 200), number, replace=False)
            ]
            slots = chance.integers(1, 200, MAX_TOKENS).astype(np.int32)
            groups = chance.integers(0, 9, MAX_TOKENS).astype(np.int32)
            active = chance.integers(0, 4, 3).astype(np.uint8)
            buffers.write(slots, groups, tables, active)
            assert buffers.active.tolist() == active.tolist()
            wanted = torch.zeros((200, 3, 5), dtype=torch.float16)
            for slot, rules in tables:
                wanted[slot] = torch.from_numpy(rules)
            assert torch.equal(buffers.rules, wanted)
            assert buffers.token_slots.tolist() == slots.tolist()
            assert buffers.token_groups.tolist() == (groups.tolist() if counting else [0] * MAX_TOKENS)
            assert buffers.staging.copies == max(1, -(-number // ROWS_PER_COPY))


class BrokenOnce(LaggingDevice):
    """Fails after the copy that is told to."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def send(self, source: torch.Tensor, target: torch.Tensor) -> CopyInFlight:
        copy = super().send(source, target)
        self.left -= 1
        if self.left == 0:
            target.fill_(1)
            raise RuntimeError("the device is gone")
        return copy


def test_what_a_failed_copy_was_to_bring_is_brought_again() -> None:
    for number in [1, 2]:
        device = BrokenOnce(number)
        state = make_state(max_requests=2, groups=0, carrier=device)
        for index in range(3):
            profile = some_profile(index, "both")
            request = f"r{index}"
            state.admit(request, arguments(profile), 1)
            if index == number - 1:
                with pytest.raises(RuntimeError, match="gone"):
                    state.begin_step([BatchRow(request, 0, 3)])
            for _ in range(2):
                state.begin_step([BatchRow(request, 0, 3)])
                wanted = expected_row(profile, SHAPE.layers, in_prompt=True)
                assert state.rules[state.token_slots[:3].long()].tolist() == [wanted] * 3


def test_a_failed_copy_leaves_no_token_marked_that_cannot_be_cleared() -> None:
    device = BrokenOnce(2)
    state = make_state(max_requests=2, groups=0, carrier=device)
    state.admit("r", arguments(some_profile(1, "both")), 1)
    state.begin_step([BatchRow("r", 0, 8)])
    state.admit("s", arguments(some_profile(2, "both")), 1)
    with pytest.raises(RuntimeError, match="gone"):
        state.begin_step([BatchRow("s", 0, 2)])
    state.clear_step()
    assert not state.token_slots.any()


def test_marks_that_a_failed_copy_was_to_bring_are_brought_again() -> None:
    """Also where nothing but marks is new."""
    buffers = StepBuffers(2, 1, 4, MAX_TOKENS, counting=True, device=CPU, carrier=BrokenOnce(1))
    slots, groups = np.zeros(3, dtype=np.int32), np.full(3, 2, dtype=np.int32)
    active = np.full(1, FORCES, dtype=np.uint8)
    with pytest.raises(RuntimeError, match="gone"):
        buffers.write(slots, groups, (), active)
    buffers.write(slots, groups, (), active)
    assert buffers.active.tolist() == [FORCES]
    assert buffers.token_slots[:3].tolist() == [0] * 3 and buffers.token_groups[:3].tolist() == [2] * 3


def test_a_step_that_is_too_long_is_refused() -> None:
    state = make_state()
    state.admit("r", arguments(some_profile(1, "both")), 99)
    with pytest.raises(ValueError, match="41 tokens; there is room for 40"):
        state.begin_step([BatchRow("r", 0, MAX_TOKENS + 1)])


def test_buffers_stay_where_a_captured_graph_reads_them() -> None:
    device = LaggingDevice()
    state = make_state(carrier=device)

    def places() -> list[int]:
        return [buffer.data_ptr() for buffer in (state.rules, state.token_slots, state.token_groups, state.counters)]

    before = places()
    run_steps(state, device, seed=3)
    state.clear_step()
    state.counts.reset()
    assert places() == before
    assert state.token_slots.data_ptr() % 16 == 0, "the kernels are compiled for aligned buffers"


def test_what_sleep_mode_saves_is_all_that_a_step_needs() -> None:
    """vLLM's sleep, level 2: registered buffers are saved and restored, all else is lost."""
    for groups in [0, 2]:
        state = make_state(groups=groups)
        profile = some_profile(1, "both")
        state.admit("r", arguments(profile), 9)
        decode = [BatchRow("r", 0, 4)]
        state.begin_step(decode)
        saved = {name: buffer.clone() for name, buffer in state.device_buffers().items()}
        for buffer in state.device_buffers().values():
            buffer.fill_(77)
        for name, buffer in state.device_buffers().items():
            buffer.copy_(saved[name])
        state.begin_step(decode)
        wanted = expected_row(profile, SHAPE.layers, in_prompt=True)
        assert state.rules[state.token_slots[:4].long()].tolist() == [wanted] * 4
        assert not state.token_slots[4:].any() and not state.token_groups.any() and not state.counters.any()
        held: Sequence[torch.Tensor] = (state.rules, state.token_slots, state.token_groups, state.counters)
        storages = {buffer.untyped_storage().data_ptr() for buffer in state.device_buffers().values()}
        assert all(tensor.untyped_storage().data_ptr() in storages for tensor in held)


def test_under_model_runner_v2_a_step_is_prepared_while_the_one_before_is_in_flight() -> None:
    """vLLM's own request and batch classes, asynchronous scheduling: the device is always a step or two behind."""
    from tests.plugin.worker.test_runner_v2 import (
        ACTIVATE,
        DEACTIVATE,
        ONE,
        PLAIN,
        TWO,
        PlainState,
        batch,
        new_request,
        rules_by_token,
    )
    from tests.plugin.worker.test_runner_v2 import SHAPE as V2_SHAPE
    from vllm_steermoe_plugin.worker.runners.v2 import with_steering

    device = LaggingDevice()
    state = SteeringState(
        V2_SHAPE, V2_SHAPE.layers, max_requests=4, max_tokens=32, count_groups=0, device=CPU, carrier=device
    )
    model_state = with_steering(PlainState, state)(None, torch.nn.Identity())
    chance = random.Random(0)
    wanted = {"a": ONE, "b": PLAIN, "c": TWO}
    for index, (name, steer) in enumerate([("a", ACTIVATE), ("b", None), ("c", DEACTIVATE)]):
        model_state.add_request(index, new_request(name, steer))
    for step in range(40):
        device.catch_up(left=chance.randint(1, 2))
        order = chance.sample("abc", chance.randint(1, 3))
        model_state.prepare_inputs(batch([(name, step, 1) for name in order], padding=2), None)
        rows = [wanted[name] for name in order]
        assert rules_by_token(state, 8) == rows + [PLAIN] * (8 - len(rows))
    device.catch_up()
    assert state.buffers.staging.waits == 0, "the ring is deep enough for two steps under way"
