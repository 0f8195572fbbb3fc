"""How the rewrite would do with other tiles: from these figures `kernels/tiles.py` is chosen. Needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.rows import TileTime
from vllm_steermoe_plugin.kernels.rewriting import launch
from vllm_steermoe_plugin.kernels.tiles import Tile, choose_tile

LAYERS, SLOTS = 16, 9
EXPERTS = (128, 8, 64, 32, 16)
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


def measure(device: torch.device) -> Iterator[TileTime]:
    """By how much each matters: the largest steps first."""
    for tokens in STEPS:
        for experts in EXPERTS:
            for dtype in (torch.bfloat16, torch.float32):
                yield from _measure_one(device, experts, tokens, dtype)


def _measure_one(device: torch.device, experts: int, tokens: int, dtype: torch.dtype) -> Iterator[TileTime]:
    generator = torch.Generator(device).manual_seed(7)
    logits = timing.make_logits(device, tokens, experts, dtype, LAYERS, generator)
    rules = torch.randint(-1, 2, (SLOTS, LAYERS, experts), generator=generator, device=device).to(torch.int8)
    steered = torch.randint(1, SLOTS, (tokens,), generator=generator, device=device, dtype=torch.int32)
    nobody = torch.zeros_like(steered)
    chosen = choose_tile(experts, tokens)
    for tile in candidates(experts, tokens):

        def rewrite(index: int, slots: torch.Tensor, tile: Tile) -> None:
            launch(logits[index % len(logits)], rules, slots, index % LAYERS, tile)

        times = timing.times_of(
            {
                "steered": partial(rewrite, slots=steered, tile=tile),
                "idle": partial(rewrite, slots=nobody, tile=tile),
            },
            replays=10,
        )
        yield TileTime(
            experts,
            tokens,
            str(dtype).removeprefix("torch."),
            tile.tokens,
            tile.warps,
            tile == chosen,
            steered=times["steered"].median,
            idle=times["idle"].median,
        )
