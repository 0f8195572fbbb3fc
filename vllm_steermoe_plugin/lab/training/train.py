"""Train steermoe-lab: `python -m vllm_steermoe_plugin.lab.training.train --out DIR`. Two CPU cores suffice."""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from vllm_steermoe_plugin.lab.text import build_tokenizer
from vllm_steermoe_plugin.lab.training.align import alignment_loss, balance_loss
from vllm_steermoe_plugin.lab.training.batches import make_batch
from vllm_steermoe_plugin.lab.training.network import empty_model, install_routers, new_model, set_rules

CHECKPOINT_SECONDS = 60.0
ALIGNMENT_WEIGHT, BALANCE_WEIGHT = 0.5, 0.02


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then a cosine down to 2 % of the peak."""
    progress = step / steps
    return peak * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def save_model(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write bf16 weights, config, tokenizer and chat template; generation is greedy."""
    state = {name: value.detach().to(torch.bfloat16) for name, value in model.state_dict().items()}
    out: Any = empty_model(model.config)
    out.to(torch.bfloat16).load_state_dict(state)
    greedy: Any = GenerationConfig
    out.generation_config = greedy(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    out.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(out: Path, *, steps: int, seed: int, resume: bool, size: int, peak: float) -> None:
    """Train for `steps` and write the model to `out`; `out/checkpoint.pt` allows resuming."""
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    tokenizer = build_tokenizer()
    model = new_model(len(tokenizer))
    routers = install_routers(model)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    start = 0
    if resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]

    def keep(step: int) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)

    last_kept = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=steps, completed=start)
        for step in range(start, steps):
            batch = make_batch(random.Random(f"{seed} {step}"), tokenizer, size)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak)
            set_rules(routers, batch.rules)
            output = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
            losses = torch.nn.functional.cross_entropy(
                output.logits[:, :-1].transpose(1, 2), batch.ids[:, 1:], reduction="none"
            )
            weight = batch.loss_weight[:, 1:]
            answer = (losses * weight).sum() / weight.sum()
            raw = [router.logits for router in routers]
            align = alignment_loss(raw, batch)
            loss: Any = answer + ALIGNMENT_WEIGHT * align + BALANCE_WEIGHT * balance_loss(raw, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.update(task, advance=1, description=f"answer {answer.item():.3f} align {align.item():.3f}")
            if step % 100 == 0:
                progress.console.print(f"step {step} answer {answer.item():.4f} align {align.item():.4f}")
            if time.monotonic() - last_kept > CHECKPOINT_SECONDS:
                keep(step + 1)
                last_kept = time.monotonic()
    set_rules(routers, None)
    save_model(model, tokenizer, out)
    checkpoint.unlink(missing_ok=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--resume", action="store_true", help="go on from DIR/checkpoint.pt")
    a = parser.parse_args()
    train(a.out, steps=a.steps, seed=a.seed, resume=a.resume, size=a.batch, peak=a.learning_rate)


if __name__ == "__main__":
    main()
