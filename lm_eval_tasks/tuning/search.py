"""Search for how much to steer: the largest gain with the controls held.

Pure: what a setting does is asked of a function, so the search is tested without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from expert_registry.errors import UsageError
from lm_eval_tasks.tuning.settings import Setting, Space


@dataclass(frozen=True, slots=True)
class Tried:
    """What a setting did on the tuning documents, against no steering.

    Attributes:
        gain: mean over the tasks of the change of the main metric, so that up is good.
        control: the worst such change among the controls; 0 without any.
        kl: mean KL divergence of the next token from the unsteered model, in nats; None where it was not measured.
    """

    setting: Setting
    gain: float
    control: float
    kl: float | None = None

    def __str__(self) -> str:
        kl = "" if self.kl is None else f"  KL {self.kl:.4f}"
        return f"{self.setting}  gain {self.gain:+.3f}  control {self.control:+.3f}{kl}"


@dataclass(frozen=True, slots=True)
class Limits:
    """What counts as held.

    Attributes:
        margin: what a control may lose.
        max_kl: the largest mean KL divergence; None for any.
    """

    margin: float
    max_kl: float | None = None

    def held(self, one: Tried) -> bool:
        """Whether a setting keeps them."""
        return one.control >= -self.margin and (self.max_kl is None or one.kl is None or one.kl <= self.max_kl)


Try = Callable[[Sequence[Setting]], Sequence[Tried]]


def search(attempt: Try, spaces: Sequence[Space], limits: Limits, budget: int) -> list[Tried]:
    """Try settings until the budget is spent or nothing is left around the best one.

    First the grids of all spaces, in turn, from little steering to much; then what lies around the best so far.

    Args:
        attempt: measures settings; each is given to it once.
        spaces: what may be tried.
        limits: what counts as held.
        budget: how many settings to try.

    Raises:
        UsageError: nothing can be tried.
    """
    rounds = zip_longest(*(space.grid() for space in spaces))
    grid = [setting for row in rounds for setting in row if setting is not None]
    if budget < 1 or not grid:
        raise UsageError(f"nothing to search: {len(grid)} settings in the grid, {budget} tries")
    tried: dict[Setting, Tried] = {}

    def run(settings: Sequence[Setting]) -> bool:
        new = [one for one in dict.fromkeys(settings) if one not in tried]
        tried.update((one.setting, one) for one in attempt(new[: budget - len(tried)]))
        return bool(new) and len(tried) < budget

    going = run(grid)
    while going:
        best = recommend(list(tried.values()), limits) or max(
            tried.values(), key=lambda one: (one.control, -(one.kl or 0.0), one.gain)
        )
        going = run([one for space in spaces for one in space.around(best.setting, tried.keys())])
    return list(tried.values())


def front(tried: Sequence[Tried]) -> list[int]:
    """Indices of those that no other beats in gain, control or KL without being worse in another (Pareto)."""
    values = [(one.gain, one.control, -(one.kl or 0.0)) for one in tried]
    return [
        i
        for i, mine in enumerate(values)
        if not any(other != mine and all(a >= b for a, b in zip(other, mine, strict=True)) for other in values)
    ]


def recommend(tried: Sequence[Tried], limits: Limits, tolerance: float = 0.01) -> Tried | None:
    """Of those within the limits, the one that steers least whose gain is within `tolerance` of the largest.

    What steers least has the smallest KL divergence, and where that is not measured or equal the smallest `effort`.
    None if no setting gains anything within the limits.
    """
    held = [one for one in tried if limits.held(one) and one.gain > 0]
    if not held:
        return None
    largest = max(one.gain for one in held)
    near = [one for one in held if one.gain >= largest - tolerance]
    return min(near, key=lambda one: (one.kl or 0.0, one.setting.effort[:2], -one.gain, one.setting.effort))


def effect(
    setting: Setting,
    before: Mapping[str, float],
    after: Mapping[str, float],
    controls: Sequence[str],
    better: Mapping[str, bool],
    kl: float | None = None,
) -> Tried:
    """From the main metric of every task, without and with steering."""
    change = {task: (after[task] - before[task]) * (1 if better[task] else -1) for task in before}
    gains = [change[task] for task in change if task not in controls]
    return Tried(setting, sum(gains) / len(gains), min((change[task] for task in controls), default=0.0), kl)
