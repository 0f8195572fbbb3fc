"""What `steermoe tune` may try, from its options."""

from __future__ import annotations

from typing import cast

import numpy as np

from expert_registry import Ranking
from expert_registry.errors import UsageError, one_of
from expert_registry.weights import SCORES, Score, weigh
from lm_eval_tasks.tuning.run import largest_numbers
from lm_eval_tasks.tuning.settings import CountSpace, DialSpace, Space
from vllm_steermoe_plugin.steering.biases import MAX_BIAS
from vllm_steermoe_plugin.steering.profile import PHASES, Phase


def names_in(text: str) -> list[str]:
    """The parts of a text with commas, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def spaces_of(
    ranking: Ranking,
    reverse: bool,
    phases: str,
    most: tuple[int, int] | None,
    strengths: str,
    top: str,
    weights: str,
    draws: int,
) -> tuple[Space, ...]:
    """Numbers of experts, unless strengths are asked for without them; and strengths, if they are.

    Raises:
        UsageError: an option says nothing that can be tried.
        ProfileError: the ranking has not what is asked for.
    """
    wanted = cast("tuple[Phase, ...]", _each_known(phases, PHASES, "phase"))
    if not wanted:
        raise UsageError("--phases names nothing")
    found: list[Space] = []
    if strengths:
        found.append(_dial(ranking, reverse, wanted, strengths, top, weights))
    elif top or weights or draws:
        raise UsageError("--top, --weights and --random are about biases; say --strengths as well")
    if most or not strengths:
        possible = largest_numbers(ranking, reverse)
        numbers = most or possible
        found.append(CountSpace(min(possible[0], numbers[0]), min(possible[1], numbers[1]), wanted))
    return tuple(found)


def _dial(
    ranking: Ranking, reverse: bool, phases: tuple[Phase, ...], strengths: str, top: str, weights: str
) -> DialSpace:
    scores = cast("tuple[Score, ...]", _each_known(weights, SCORES, "weights")) or (None,)
    experts = min(int(np.count_nonzero(weigh(ranking, by))) for by in scores)
    space = DialSpace(
        tuple(sorted(_strength(one) for one in names_in(strengths))),
        tuple(sorted((_top(one) for one in names_in(top or "all")), key=lambda n: n or experts + 1)),
        scores,
        experts,
        phases,
    )
    for setting in space.grid():
        setting.profile(ranking, reverse)
    return space


def _strength(text: str) -> float:
    try:
        strength = float(text)
    except ValueError:
        strength = 0.0
    if not 0.001 <= strength <= MAX_BIAS:
        raise UsageError(
            f"--strengths {text!r:.40}: write numbers from 0.001 to {MAX_BIAS}, such as 0.5,1,2; --reverse steers away"
        )
    return strength


def _top(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1_000_000:
        raise UsageError(f"--top {text!r:.40}: write numbers of experts, or all, such as 50,200,all")
    return int(text)


def _each_known(text: str, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    wanted = names_in(text)
    for one in wanted:
        if one not in known:
            raise UsageError(one_of(one, known, what))
    return tuple(wanted)
