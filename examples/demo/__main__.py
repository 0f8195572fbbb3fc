"""`make demo`: detect, rank, serve and measure steermoe-lab with the real vLLM.

Writes out/demo.json and out/demo.png.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# In-process engines on one thread each: quickest to start, and no stall beside other busy processes.
for _key, _value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(_key, _value)

from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402

from examples.demo.detection import agreement_with_shipped, counting_engine, detect_all  # noqa: E402
from examples.demo.evaluation import Evaluator  # noqa: E402
from examples.demo.quiet import stderr_to  # noqa: E402
from examples.demo.report import Measured, print_table, write_json  # noqa: E402
from examples.demo.serving import server, show_answers  # noqa: E402
from examples.demo.steerings import random_steerings, steerings  # noqa: E402
from expert_registry import Ranking, Registry  # noqa: E402
from expert_registry.places import BUNDLED  # noqa: E402
from vllm_steermoe_plugin.compat.versions import tool_versions  # noqa: E402
from vllm_steermoe_plugin.lab.world import BEHAVIOURS  # noqa: E402
from vllm_steermoe_plugin.views.figures import draw_heatmaps  # noqa: E402


def main() -> None:
    """Run the four steps and time each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to")
    parser.add_argument("--draws", type=int, default=10, help="draws of random experts")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if os.isatty(1) else 150)
    seconds: dict[str, float] = {}

    with _step("detect and rank", seconds, console):
        registry = out / "registry"
        with console.status("start the engine"), stderr_to(out / "engine.log"):
            engine = counting_engine()
        rankings = detect_all(engine, registry)
        draw_heatmaps(list(rankings.values()), out / "demo.png")
        agreement = agreement_with_shipped(rankings, Registry((BUNDLED,)))
        for behaviour, ranking in rankings.items():
            top = ", ".join(f"{e.layer}/{e.expert} {e.risk_difference:+.2f}" for e in ranking.experts()[:6])
            console.print(
                f"  {behaviour:<13} {ranking.card.data.pairs} pairs; layer/expert: {top} ...; "
                f"{agreement[behaviour]:.0%} of the recommended experts as shipped"
            )
    os.environ["STEERMOE_REGISTRY"] = str(registry)

    with _step("serve", seconds, console), server(registry, out / "serve.log", console) as client:
        for behaviour, ranking in rankings.items():
            compared = {**steerings(behaviour), "random": random_steerings(ranking, 1)[0]}
            show_answers(client, behaviour, compared, console)

    with _step("measure", seconds, console):
        with console.status("start the engine"), stderr_to(out / "engine.log"):
            evaluator = Evaluator.start()
        # lm-eval's and vLLM's own progress bars go to the log; one bar of ours shows the whole.
        with stderr_to(out / "engine.log"):
            measured = _measure(evaluator, rankings, arguments.draws, console)
    print_table(measured, console)
    extra = {"versions": tool_versions(), "agreement_with_shipped": agreement}
    write_json(measured, seconds, extra, out / "demo.json")
    console.print(f"wrote {out / 'demo.json'} and {out / 'demo.png'}")


def _measure(evaluator: Evaluator, rankings: dict[str, Ranking], draws: int, console: Console) -> dict[str, Measured]:
    """Evaluate every behaviour and its control under every steering."""
    measured = {behaviour: Measured() for behaviour in BEHAVIOURS}
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("lm-eval", total=len(rankings) * (3 + draws))
        for behaviour, ranking in rankings.items():
            task, control = f"steermoe_lab_{behaviour}", f"steermoe_lab_{behaviour}_control"
            one = measured[behaviour]
            for name, steering in steerings(behaviour).items():
                outcomes = evaluator.run(steering, [task, control])
                one.behaviour[name], one.control[name] = outcomes[task], outcomes[control]
                progress.advance(bar)
            for steering in random_steerings(ranking, draws):
                outcomes = evaluator.run(steering, [task, control])
                one.random.append(outcomes[task])
                one.random_control.append(outcomes[control])
                progress.advance(bar)
    return measured


@contextmanager
def _step(name: str, seconds: dict[str, float], console: Console) -> Iterator[None]:
    console.rule(name, align="left")
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start
    console.print(f"  {name}: {seconds[name]:.0f} s")


if __name__ == "__main__":
    main()
