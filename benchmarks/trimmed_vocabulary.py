"""How much faster is a training step with the tokens of the data alone?

    python benchmarks/trimmed_vocabulary.py                     # mT5-small's shape, 250,112 words and 32,000
    python benchmarks/trimmed_vocabulary.py --words 16000 --pairs 7 --method ia3

Both sides are `LeftTrainer` with the same weights and the same rows, random tokens that both have; one has its tables
trimmed as `shrink_to="vocabulary=data"` does it. They take turns in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from datasets import Dataset, disable_progress_bars
from races import MT5_SMALL, Race
from side import WARMUP_STEPS, Start, common_arguments, left_side, pad_and_end_tokenizer, random_model, random_rows
from torch import float32
from transformers import PreTrainedModel, PrinterCallback
from transformers.utils.logging import disable_progress_bar

from left_trainer import LeftTrainer
from left_trainer.callbacks.logging import CompactPrinterCallback
from left_trainer.callbacks.step_timer import StepTimerCallback
from left_trainer.compression.vocabulary_tables import keep_rows, tables_of
from left_trainer.runs.measurements import machine_name

WANTED = 1.8
RESULTS = Path(__file__).parent / "results" / "trimmed_vocabulary.json"


def model_of(words: int) -> PreTrainedModel:
    """The same weights for every number of words."""
    model = random_model(MT5_SMALL, float32, "cpu")
    keep_rows(model, tables_of(model), range(words))
    return model


def trainer_of(race: Race, model: PreTrainedModel, rows: Dataset, folder: str) -> tuple[LeftTrainer, StepTimerCallback]:
    """A trainer, and what times its steps."""
    start = Start(race, model, pad_and_end_tokenizer(model), rows, rows)
    trainer, timer = left_side(start, common_arguments(race, folder, "cpu")), StepTimerCallback()
    for printer in (PrinterCallback, CompactPrinterCallback):
        trainer.remove_callback(printer)
    trainer.add_callback(timer)
    return trainer, timer


def turn(trainer: LeftTrainer, timer: StepTimerCallback) -> float:
    """Seconds of the median step of a short training."""
    trainer.train()
    return statistics.median(timer.seconds[WARMUP_STEPS:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, default=32_000, help="that are left")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each side that count")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    disable_progress_bars()
    disable_progress_bar()
    whole = MT5_SMALL.config["vocab_size"]
    race = Race("trimmed_vocabulary", options.method, MT5_SMALL)
    models = {words: model_of(words) for words in (whole, options.words)}
    table_bytes = {words: sum(table.tensor.nbytes for table in tables_of(model)) for words, model in models.items()}
    rows = random_rows(race, models[options.words])  # of tokens that both have
    seconds: dict[int, list[float]] = {words: [] for words in models}
    with tempfile.TemporaryDirectory() as folder:
        sides = {words: trainer_of(race, model, rows, f"{folder}/{words}") for words, model in models.items()}
        for number in range(options.pairs + 1):
            for words, side in sides.items():
                took = turn(*side)
                seconds[words] += [took] * (number > 0)  # the first is a warm-up
    ratios = [before / after for before, after in zip(seconds[whole], seconds[options.words], strict=True)]
    speed = statistics.median(ratios)
    for words, n_bytes in table_bytes.items():
        step = statistics.median(seconds[words])
        print(f"{words:>8,} words: {step:.3f} s a step, {n_bytes / 2**20:,.0f} MiB of tables")
    reached = "reached" if speed >= WANTED else "missed"
    print(f"{speed:.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f}); {WANTED} wanted: {reached}")
    record = {
        "method": options.method,
        "seconds": {str(words): each for words, each in seconds.items()},
        "table_bytes": {str(words): n_bytes for words, n_bytes in table_bytes.items()},
        "speed": {"median": speed, "min": min(ratios), "max": max(ratios), "wanted": WANTED},
        "machine": machine_name(),
    }
    options.results.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
