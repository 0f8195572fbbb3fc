"""How the rewrite would do with other tiles: from these figures `kernels/tiles.py` is chosen. Needs a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.rows import TileTime
from vllm_steermoe_plugin.device.kernels.rewriting import launch
from vllm_steermoe_plugin.device.kernels.tiles import Tile, choose_tile
from vllm_steermoe_plugin.device.rewrite import forcing
from vllm_steermoe_plugin.steering.rule_values import FORCES

LAYERS, SLOTS = 16, 9
EXPERTS = (128, 256, 32, 512, 64, 8, 16)
STEPS = (8192, 64)


def candidates(experts: int, tokens: int) -> Iterator[Tile]:
    """The chosen tile, and others with 2 to 16 logits a thread."""
    chosen = choose_tile(experts, tokens)
    yield chosen
    for rows in (1, 2, 4, 8, 16, 32, 64):
        for warps in (1, 2, 4, 8):
            tile = Tile(rows, chosen.experts, warps)
            if 2 <= rows * chosen.experts / (32 * warps) <= 16 and rows <= max(16, tokens // 128) and tile != chosen:
                yield tile


def all_rows(device: torch.device) -> Iterator[tuple[str, Callable[[], TileTime]]]:
    """By how much each matters: the largest steps first; by name."""
    for tokens, experts, dtype in itertools.product(STEPS, EXPERTS, (torch.bfloat16, torch.float32)):
        for tile in candidates(experts, tokens):
            yield f"{tile}, T={tokens}, {dtype}", partial(_measure_one, device, experts, tokens, dtype, tile)


def _measure_one(device: torch.device, experts: int, tokens: int, dtype: torch.dtype, tile: Tile) -> TileTime:
    generator = torch.Generator(device).manual_seed(7)
    logits = timing.make_logits(device, tokens, experts, dtype, LAYERS, generator)
    rules = forcing(torch.randint(-1, 2, (SLOTS, LAYERS, experts), generator=generator, device=device))
    steered = torch.randint(1, SLOTS, (tokens,), generator=generator, device=device, dtype=torch.int32)
    nobody = torch.zeros_like(steered)
    active = torch.full((LAYERS,), FORCES, dtype=torch.uint8, device=device)

    def rewrite(index: int, slots: torch.Tensor) -> None:
        launch(logits[index % len(logits)], rules, slots, active, index % LAYERS, tile)

    times = timing.times_of(
        {"steered": partial(rewrite, slots=steered), "idle": partial(rewrite, slots=nobody)}, replays=10
    )
    return TileTime(
        experts,
        tokens,
        str(dtype).removeprefix("torch."),
        tile.tokens,
        tile.warps,
        tile == choose_tile(experts, tokens),
        steered=times["steered"].median,
        idle=times["idle"].median,
    )
