"""Every profile of a run against its baseline, example by example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lm_eval_tasks.compare.intervals import Interval, holm, mcnemar, mean_of, mean_over_changes, paired_change, unseen
from lm_eval_tasks.compare.run_file import ProfileRecord, Run
from lm_eval_tasks.errors import ComparisonError

LEVEL = 0.05
"""Of the tests: adjusted for the main metrics, as it is for others."""
MARGIN = 0.03
"""What a control may lose, in the units of its metric."""


@dataclass(frozen=True, slots=True)
class Change:
    """One metric of one task under one profile, against the baseline.

    Attributes:
        p: McNemar's exact test; None for outcomes that are not binary.
        adjusted: `p` adjusted by Holm for all main metrics of the comparison; None for others.
        verdict: `better`, `worse` or `no change shown`; for controls `held`, `dropped` or `unclear`.
    """

    task: str
    metric: str
    profile: str
    control: bool
    main: bool
    higher_is_better: bool
    before: Interval
    after: Interval
    change: Interval
    p: float | None
    adjusted: float | None
    verdict: str


@dataclass(frozen=True, slots=True)
class RandomControl:
    """The main metric under a profile, beside as many experts drawn at random.

    Attributes:
        changes: one per draw.
        mean: of them, with Student's interval.
        p: the share of draws that moved at least as far, either way; (1 + those) / (1 + draws).
    """

    task: str
    metric: str
    profile: str
    change: float
    changes: tuple[float, ...]
    mean: Interval
    p: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """All of it, with what it was computed from."""

    run: Run
    baseline: str
    margin: float
    changes: tuple[Change, ...]
    random: tuple[RandomControl, ...]

    def controls_held(self, profile: str) -> bool | None:
        """Whether all controls held under a profile; None if there is none."""
        verdicts = [c.verdict for c in self.changes if c.profile == profile and c.control and c.main]
        return all(verdict == "held" for verdict in verdicts) if verdicts else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.run.model,
            "baseline": self.baseline,
            "margin": self.margin,
            "changes": [asdict(change) for change in self.changes],
            "random": [asdict(one) for one in self.random],
        }


def compare(run: Run, baseline: str | None = None, margin: float = MARGIN) -> Comparison:
    """Compare all profiles with the baseline.

    Args:
        run: with at least two profiles.
        baseline: name of a profile; None for the first that is not steered, else the first.
        margin: by how much a control may be lower and still count as held.

    Raises:
        ComparisonError: nothing to compare, or no such baseline.
    """
    if not 0 < margin < 1:
        raise ComparisonError(f"margin {margin}: it must lie between 0 and 1")
    first = next((profile for profile in run.profiles if profile.kind == "none"), run.profiles[0])
    base = run.profile(baseline) if baseline is not None else first
    others = [profile for profile in run.profiles if profile is not base]
    if not others:
        raise ComparisonError(f"there is nothing to compare with {base.name!r}; give a second profile or file")
    changes = [
        _change(run, base, profile, task, metric, margin)
        for profile in others
        if profile.kind != "random"
        for task, record in run.tasks.items()
        for metric in record.metrics
    ]
    random = [
        _random(run, base, profile, task)
        for profile in others
        if profile.kind != "random" and any(draw.of == profile.name for draw in others)
        for task in run.tasks
    ]
    return Comparison(run, base.name, margin, tuple(_adjusted(changes)), tuple(random))


def _change(run: Run, base: ProfileRecord, profile: ProfileRecord, task: str, metric: str, margin: float) -> Change:
    record = run.tasks[task]
    before, after = base.outcomes[task][metric], profile.outcomes[task][metric]
    change = paired_change(before, after)
    higher = record.metrics[metric]
    judge = _control_verdict if record.control else _verdict
    return Change(
        task=task,
        metric=metric,
        profile=profile.name,
        control=record.control,
        main=metric == next(iter(record.metrics)),
        higher_is_better=higher,
        before=mean_of(before),
        after=mean_of(after),
        change=change,
        p=mcnemar(before, after),
        adjusted=None,
        verdict=judge(change if higher else _negated(change), before != after, margin),
    )


def _verdict(gain: Interval, moved: bool, margin: float) -> str:
    return "better" if gain.low > 0 else "worse" if gain.high < 0 else "no change shown"


def _control_verdict(gain: Interval, moved: bool, margin: float) -> str:
    # Where nothing moved, the bootstrap knows no spread; how little was looked at still counts.
    low = gain.low if moved else -unseen(gain.n)
    if low >= -margin:
        return "held"
    return "dropped" if gain.value < -margin and gain.high < 0 else "unclear"


def _negated(interval: Interval) -> Interval:
    return Interval(-interval.value, -interval.high, -interval.low, interval.n)


def _adjusted(changes: Sequence[Change]) -> list[Change]:
    tested = [i for i, change in enumerate(changes) if change.main and change.p is not None]
    values = holm([changes[i].p or 0.0 for i in tested])
    by_index = dict(zip(tested, values, strict=True))
    return [_checked(replace(change, adjusted=by_index.get(i))) for i, change in enumerate(changes)]


def _checked(change: Change) -> Change:
    """Few changed examples can push a bootstrapped interval off zero: the exact test must agree."""
    p = change.p if change.adjusted is None else change.adjusted
    if change.verdict in ("better", "worse") and p is not None and p >= LEVEL:
        return replace(change, verdict="no change shown")
    return change


def _random(run: Run, base: ProfileRecord, profile: ProfileRecord, task: str) -> RandomControl:
    metric = next(iter(run.tasks[task].metrics))
    before = base.outcomes[task][metric]
    change = paired_change(before, profile.outcomes[task][metric]).value
    draws = [draw for draw in run.profiles if draw.kind == "random" and draw.of == profile.name]
    found = [sum(draw.outcomes[task][metric]) / len(before) - sum(before) / len(before) for draw in draws]
    # Sums of the same outcomes may differ in their last bit.
    as_far = sum(abs(one) >= abs(change) - 1e-9 for one in found)
    p = (1 + as_far) / (1 + len(found))
    return RandomControl(task, metric, profile.name, change, tuple(found), mean_over_changes(found), p)
