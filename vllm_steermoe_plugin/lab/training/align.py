"""The loss that plants the routing: margins between router logits, layer by layer."""

from __future__ import annotations

from functools import cache

import torch

from vllm_steermoe_plugin.lab.training.batches import MODE_PROMPT, Batch
from vllm_steermoe_plugin.lab.training.planting import EXPERTS, PLANTED, PLANTED_LAYERS, free_experts
from vllm_steermoe_plugin.lab.world import BEHAVIOURS

MARGIN = 1.0
"""Wanted distance of router logits; far above the rounding of bfloat16 at their size."""

SPARE = 4
"""Planted experts that are out of a token's state stay below this many free experts."""


@cache
def _states(layer: int) -> torch.Tensor:
    """Bool `[behaviour, mode 0..3, phase, E]`: which experts a token's state contains."""
    states = torch.zeros(len(BEHAVIOURS), 4, 2, EXPERTS, dtype=torch.bool)
    for b, behaviour in enumerate(BEHAVIOURS):
        one, two = (PLANTED[behaviour][f"side {side}"][layer] for side in (1, 2))
        states[b, 1, :, list(one)] = True
        states[b, 2, :, list(two)] = True
        for phase in (0, 1):
            states[b, 0, phase, [one[phase], two[phase]]] = True
    return states


def alignment_loss(logits: list[torch.Tensor], batch: Batch) -> torch.Tensor:
    """Mean hinge over planted layers: a state's experts `MARGIN` above all free experts,
    the other planted ones `MARGIN` below the free experts that may be needed.

    `logits`: raw router logits `[B*S, E]` of every layer. Tokens of the prompt use no
    planted expert (mode 3); tokens of mode "free" and padding are left out.
    """
    modes = batch.modes.reshape(-1)
    phases = batch.ids.reshape(-1) % 2
    behaviours = batch.behaviours[:, None].expand_as(batch.modes).reshape(-1)
    counted = modes <= MODE_PROMPT
    weight = torch.where(modes == MODE_PROMPT, 0.3, 1.0)[counted]
    total = logits[0].new_zeros(())
    for layer in PLANTED_LAYERS:
        z = logits[layer][counted]
        inside = _states(layer)[behaviours[counted], modes[counted], phases[counted]]
        free = z[:, free_experts(layer)]
        top = free.topk(SPARE, dim=-1).values
        planted = torch.ones(EXPERTS, dtype=torch.bool)
        planted[free_experts(layer)] = False
        above = torch.relu(top[:, :1] + MARGIN - z) * inside
        below = torch.relu(z + MARGIN - top[:, -1:]) * (planted & ~inside)
        total = total + ((above.sum(-1) + below.sum(-1)) * weight).sum() / weight.sum()
    return total / len(PLANTED_LAYERS)


def balance_loss(logits: list[torch.Tensor], batch: Batch) -> torch.Tensor:
    """Squared coefficient of variation of the mean router probability over free experts."""
    real = batch.mask.reshape(-1).bool()
    total = logits[0].new_zeros(())
    for layer, z in enumerate(logits):
        free = free_experts(layer)
        share = torch.softmax(z[real][:, free], dim=-1).mean(0) * len(free)
        total = total + ((share - 1) ** 2).mean()
    return total / len(logits)
