"""The custom operators that run inside the model's graph: rewrite router logits, correct a selection, count it.

They are custom operators so that `torch.compile` keeps them as they are, with their
mutation declared, and CUDA graphs capture them. They read persistent buffers, so what
they do changes from step to step without a new graph. On a GPU each is one Triton kernel
(`kernels/`), elsewhere plain PyTorch, which is also what the kernels are compared with.
Triton is imported when the first CUDA tensor comes.

Axes: T tokens of the step (padded), S slots, L MoE layers, E experts, K top-k, G groups.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_steermoe_plugin.device.reselect import reselect
from vllm_steermoe_plugin.device.rewrite import apply_rules
from vllm_steermoe_plugin.device.router_kind import RouterKind
from vllm_steermoe_plugin.steering.rule_values import BIASES, FORCED, FORCES

_LIBRARY: Any = torch.library.Library("steermoe", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "rewrite_(Tensor(a!) logits, Tensor rules, Tensor token_slots, Tensor active, int row, bool log_softmax=False,"
    " bool bfloat16=False, bool forces=True) -> ()"
)
_LIBRARY.define(
    "reselect_(Tensor(a!) weights, Tensor(b!) ids, Tensor logits, Tensor? bias, Tensor rules, Tensor token_slots,"
    " Tensor active, int row, str score, int groups, int kept, bool renormalize, float scale) -> ()"
)
_LIBRARY.define("count_(Tensor topk_ids, Tensor(a!) counters, Tensor token_groups, int row) -> ()")


def _rewrite(
    logits: torch.Tensor,
    rules: torch.Tensor,
    token_slots: torch.Tensor,
    active: torch.Tensor,
    row: int,
    log_softmax: bool = False,
    bfloat16: bool = False,
    forces: bool = True,
) -> None:
    """Rewrite `logits [T, E]` in place by `rules[token_slots[:T], row]`; `rules` is float16 `[S, L, E]`.

    `log_softmax`, `bfloat16`, `forces`: see `apply_rules`. `active` is uint8 `[L]`: what the rules of this step do in a
    layer, as in `RuleTable.does`.
    """
    does = int(active[row])
    biases = bool(does & BIASES)
    if not (biases or (forces and does & FORCES)):
        return
    mine, slots = rules[:, row], token_slots[: logits.shape[0]]
    if not biases:
        # Half precision is slow on a CPU, and of what forces the sign says all; of the smaller of table and rows.
        rows = _signs(mine).index_select(0, slots) if len(slots) > len(mine) else _signs(mine.index_select(0, slots))
    else:
        rows = mine.index_select(0, slots)
    steered = apply_rules(logits, rows, log_softmax=log_softmax, bfloat16=bfloat16, biases=biases, forces=forces)
    logits.copy_(steered)


def _signs(rules: torch.Tensor) -> torch.Tensor:
    """1, -1 and 0 of rules without a bias, int8."""
    return (rules > 0).char() - (rules < 0).char()


def _reselect(
    weights: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    rules: torch.Tensor,
    token_slots: torch.Tensor,
    active: torch.Tensor,
    row: int,
    *router: Any,
) -> None:
    """Correct `weights` and `ids [T, K]` in place by `rules[token_slots[:T], row]`; the rest as in `reselect`.

    `router`: `RouterKind.arguments`.
    """
    if not int(active[row]) & FORCES:
        return
    if ids.dtype is torch.uint32:
        # To which torch cannot write by index.
        ids = ids.view(torch.int32)
    mine, slots = rules[:, row], token_slots[: len(logits)]
    ruled = (mine.abs() > FORCED).any(dim=1)[slots]
    rows = slice(None) if ruled.all() else ruled.nonzero()[:, 0]
    kind = RouterKind.of_arguments(bias is not None, *router)
    weights[rows], ids[rows] = reselect(weights[rows], ids[rows], logits[rows], bias, mine[slots[rows]], kind)


def _count(topk_ids: torch.Tensor, counters: torch.Tensor, token_groups: torch.Tensor, row: int) -> None:
    """Add one to `counters[row, group, expert]` for each selection in `topk_ids [T, K]` of a counted token.

    `counters` is int64 `[L, G + 1, E]`. Tokens in group 0 are not counted, whatever their ids are (padding may
    have the id -1).
    """
    groups = token_groups[: topk_ids.shape[0]].long()[:, None]
    counted = (groups > 0).expand_as(topk_ids)
    index = torch.where(counted, groups * counters.shape[2] + topk_ids.long(), 0)
    flat = counters[row].view(-1)
    flat.scatter_add_(0, index.flatten(), counted.to(torch.int64).flatten())


def _rewrite_on_gpu(
    logits: torch.Tensor,
    rules: torch.Tensor,
    token_slots: torch.Tensor,
    active: torch.Tensor,
    row: int,
    log_softmax: bool = False,
    bfloat16: bool = False,
    forces: bool = True,
) -> None:
    from vllm_steermoe_plugin.device.kernels.rewriting import rewrite

    rewrite(logits, rules, token_slots, active, row, log_softmax, bfloat16, forces)


def _reselect_on_gpu(
    weights: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    rules: torch.Tensor,
    token_slots: torch.Tensor,
    active: torch.Tensor,
    row: int,
    *router: Any,
) -> None:
    from vllm_steermoe_plugin.device.kernels.reselecting import reselect as launch

    kind = RouterKind.of_arguments(bias is not None, *router)
    launch(weights, ids, logits, bias, rules, token_slots, active, row, kind)


def _count_on_gpu(topk_ids: torch.Tensor, counters: torch.Tensor, token_groups: torch.Tensor, row: int) -> None:
    from vllm_steermoe_plugin.device.kernels.counting import count

    count(topk_ids, counters, token_groups, row)


def _fake(*_: object) -> None:
    """Of each operator: it returns nothing, and writes to what it is given."""


for _name, _plain, _on_gpu in (
    ("rewrite_", _rewrite, _rewrite_on_gpu),
    ("reselect_", _reselect, _reselect_on_gpu),
    ("count_", _count, _count_on_gpu),
):
    _LIBRARY.impl(_name, _plain, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _on_gpu, "CUDA")
    torch.library.register_fake(f"steermoe::{_name}", _fake, lib=_LIBRARY)

rewrite_ = torch.ops.steermoe.rewrite_
reselect_ = torch.ops.steermoe.reselect_
count_ = torch.ops.steermoe.count_
