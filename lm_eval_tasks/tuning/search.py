"""Search for how many experts to activate and deactivate: the largest gain with the controls held.

Pure: what a setting does is asked of a function, so the search is tested without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from expert_registry.errors import UsageError
from vllm_steermoe_plugin.steering.profile import Phase


@dataclass(frozen=True, slots=True, order=True)
class Setting:
    """Numbers of experts, and the tokens to steer."""

    activate: int
    deactivate: int
    phase: Phase = "both"

    @property
    def size(self) -> int:
        return self.activate + self.deactivate

    def __str__(self) -> str:
        return f"activate={self.activate} deactivate={self.deactivate} phase={self.phase}"


@dataclass(frozen=True, slots=True)
class Tried:
    """What a setting did on the tuning documents, against no steering.

    Attributes:
        gain: mean over the tasks of the change of the main metric, so that up is good.
        control: the worst such change among the controls; 0 without any.
    """

    setting: Setting
    gain: float
    control: float


Try = Callable[[Setting], Tried]


def levels(most: int) -> list[int]:
    """0, 1, 2, 4, ... up to `most`, which is the last."""
    found = [0]
    step = 1
    while step < most:
        found.append(step)
        step *= 2
    return [*found, most] if most else found


def search(attempt: Try, most: tuple[int, int], phases: Sequence[Phase], margin: float, budget: int) -> list[Tried]:
    """Try settings until the budget is spent or nothing is left around the best one.

    First a coarse grid over both numbers, from few experts to many; then, around the best so far,
    the other phases and the midpoints to the nearest numbers that were tried.

    Args:
        attempt: measures one setting; called once for each.
        most: largest numbers to activate and to deactivate.
        phases: to be considered; the grid uses the first.
        margin: what a control may lose.
        budget: how many settings to try.

    Raises:
        UsageError: nothing can be tried.
    """
    if budget < 1 or sum(most) < 1 or not phases or min(most) < 0:
        raise UsageError(f"nothing to search: at most {most[0]}/{most[1]} experts, {budget} tries")
    tried: dict[Setting, Tried] = {}

    def run(settings: Sequence[Setting]) -> bool:
        new = [one for one in dict.fromkeys(settings) if one not in tried and one.size]
        for one in new[: budget - len(tried)]:
            tried[one] = attempt(one)
        return bool(new) and len(tried) < budget

    grid = [Setting(a, d, phases[0]) for a in _coarse(most[0]) for d in _coarse(most[1])]
    going = run(sorted(grid, key=lambda one: one.size))
    while going:
        best = recommend(list(tried.values()), margin) or max(tried.values(), key=lambda one: (one.control, one.gain))
        going = run(list(_around(best.setting, tried, phases, most)))
    return list(tried.values())


def front(tried: Sequence[Tried]) -> list[int]:
    """Indices of those that no other beats in gain or control without being worse in the other (Pareto)."""
    return [
        i
        for i, one in enumerate(tried)
        if not any(
            other.gain >= one.gain
            and other.control >= one.control
            and (other.gain, other.control) != (one.gain, one.control)
            for other in tried
        )
    ]


def recommend(tried: Sequence[Tried], margin: float, tolerance: float = 0.01) -> Tried | None:
    """Of those whose controls lost at most `margin`, the smallest whose gain is within `tolerance` of the largest.

    None if no setting gains anything with its controls held.
    """
    held = [one for one in tried if one.control >= -margin and one.gain > 0]
    if not held:
        return None
    largest = max(one.gain for one in held)
    near = [one for one in held if one.gain >= largest - tolerance]
    return min(near, key=lambda one: (one.setting.size, -one.gain, one.setting))


def effect(
    setting: Setting,
    before: Mapping[str, float],
    after: Mapping[str, float],
    controls: Sequence[str],
    better: Mapping[str, bool],
) -> Tried:
    """From the main metric of every task, without and with steering."""
    change = {task: (after[task] - before[task]) * (1 if better[task] else -1) for task in before}
    gains = [change[task] for task in change if task not in controls]
    return Tried(setting, sum(gains) / len(gains), min((change[task] for task in controls), default=0.0))


def _coarse(most: int) -> list[int]:
    """Every second level, and the last."""
    every = levels(most)
    return sorted({*every[::2], every[-1]})


def _around(
    best: Setting, tried: Mapping[Setting, Tried], phases: Sequence[Phase], most: tuple[int, int]
) -> Iterator[Setting]:
    for phase in phases:
        yield Setting(best.activate, best.deactivate, phase)
    activates = sorted({one.activate for one in tried})
    deactivates = sorted({one.deactivate for one in tried})
    for value in _midpoints(best.activate, activates, most[0]):
        yield Setting(value, best.deactivate, best.phase)
    for value in _midpoints(best.deactivate, deactivates, most[1]):
        yield Setting(best.activate, value, best.phase)


def _midpoints(at: int, known: Sequence[int], most: int) -> Iterator[int]:
    below = max((value for value in known if value < at), default=None)
    above = min((value for value in known if value > at), default=None)
    for other in (below, above):
        if other is not None:
            # The neighbour itself may have been tried only beside another number.
            yield from {(at + other) // 2, other} - {at}
    if above is None and at < most:
        yield most
