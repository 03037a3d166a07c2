"""Hold estimates of the time of a step against published measurements: `python benchmarks/step_time.py`.

The runs are those of PEFT's method comparison on MetaMathQA (Llama-3.2-3B, one L40S), recorded as `memory_plan.py`
records them, with 4 rows of 210 tokens: the 840 tokens of an average step. What PEFT publishes is tokens a second.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass

from memory_plan import plan_plain_loop, published_rows

from left_trainer.planning.devices import find_device
from left_trainer.planning.timing import step_time

ROW_TOKENS = 210
PLAIN_LORA = "lora--llama-3.2-3B-rank32"
RELATIVE, ABSOLUTE = 0.25, 0.30  # errors up to which an estimate counts as right


@dataclass(frozen=True)
class Pair:
    """Seconds of a step, measured and estimated."""

    run: str
    measured: float
    estimated: float
    bound: str

    def error(self, unit: Pair | None = None) -> float:
        """Of the estimate, of the time itself or of the time in steps of `unit`."""
        ratio = self.estimated / self.measured
        return ratio / (unit.estimated / unit.measured) - 1 if unit else ratio - 1


def pairs(device_name: str, only: str) -> list[Pair]:
    """A pair for each published run, plain LoRA's first."""
    device, found = find_device(device_name), []
    rows = sorted(published_rows(), key=lambda row: row["experiment"] != PLAIN_LORA)
    for row in rows:
        if only not in row["experiment"] and row["experiment"] != PLAIN_LORA:
            continue
        time = step_time(plan_plain_loop(row, ROW_TOKENS).operations, device)
        measured = row["batch_size"] * ROW_TOKENS / row["train_tokens_per_second_median"]
        found.append(Pair(row["experiment"], measured, time.seconds, time.bound))
        print_row(found[-1], found[0])
    return found


def print_row(pair: Pair, lora: Pair) -> None:
    print(
        f"{pair.run[:48]:48} {1000 * pair.measured:9.0f} {1000 * pair.estimated:9.0f} {pair.error():+9.0%} "
        f"{pair.error(lora):+9.0%}  {pair.bound}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="l40s", help="of `left-trainer plan` (default: %(default)s)")
    parser.add_argument("--only", default="", help="runs whose name has this in it, beside plain LoRA")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{'run':48} {'measured':>9} {'estimated':>9} {'error':>9} {'to LoRA':>9}  bound by   ms a step")
    found = pairs(options.device, options.only)
    lora, others = found[0], found[1:]
    n_relative = sum(abs(pair.error(lora)) <= RELATIVE for pair in others)
    n_absolute = sum(abs(pair.error()) <= ABSOLUTE for pair in found)
    print(f"{n_relative} of {len(others)} within {RELATIVE:.0%} of the time relative to plain LoRA's,")
    print(f"{n_absolute} of {len(found)} within {ABSOLUTE:.0%} of the time itself.")


if __name__ == "__main__":
    main()
