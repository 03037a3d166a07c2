"""The most that a race could reach: a training step whose matrix products and random masks are all that takes time.

    python benchmarks/limit.py mt5_small_lora bart_base_lora

Both sides of a race have these operations and no exact computation does without them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile

from race import SHARED
from races import RACES, Race, tiny
from side import SIDES, WARMUP_STEPS, common_arguments, load_start
from torch.profiler import ProfilerActivity, profile

from left_trainer.callbacks.step_timer import StepTimerCallback

# By the beginnings of their names; bernoulli_ draws the masks of dropout.
NEEDED = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product", "aten::bernoulli_")


def step_seconds(race: Race, side: str) -> tuple[float, float]:
    """A training step of one side: all of it, and what of it the needed operations take under the profiler."""
    start = load_start(race, "cpu", SHARED)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SIDES[side](start, common_arguments(race, folder, "cpu"))
        timer = StepTimerCallback()
        trainer.add_callback(timer)
        trainer.train()
        trainer.train()
        seconds = statistics.median(timer.seconds[WARMUP_STEPS:])
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            trainer.train()
    needed = [event for event in profiler.key_averages() if event.key.startswith(NEEDED)]
    return seconds, sum(event.self_cpu_time_total for event in needed) / 1e6 / race.steps


def row(name: str, rival: float, ours: float, needed: float) -> str:
    """A line of the table, from seconds of a step."""
    return f"| {name} | {rival:.3f} s | {ours:.3f} s | {needed:.3f} s | {rival / ours:.2f} | {rival / needed:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name, race in RACES.items() if race.measure == "training_step" and race.device == "cpu"]
    parser.add_argument("races", nargs="+", choices=names, metavar="RACE", help=", ".join(names))
    parser.add_argument("--tiny", action="store_true", help="a toy size: shows that it runs")
    options = parser.parse_args()
    lines = [
        "| race | step, rival | step, ours | of ours, needed | times as fast | at most |",
        "|---|---|---|---|---|---|",
    ]
    for name in options.races:
        race = tiny(RACES[name]) if options.tiny else RACES[name]
        rival, _ = step_seconds(race, race.rival)
        ours, needed = step_seconds(race, "left")
        lines.append(row(name, rival, ours, needed))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
