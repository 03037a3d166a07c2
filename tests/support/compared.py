"""What comparisons that ran in different ways have to agree in."""

from __future__ import annotations

import csv
from pathlib import Path

from left_trainer.comparison.results import read_cells
from left_trainer.runs.report import TrainingReport

# Figures that depend on how busy the machine is.
MEASURED = ("peak_memory_train_bytes", "peak_memory_generation_bytes", "train_steps_per_second")
MEASURED += ("run_seconds", "target_tokens_per_second", "generation_samples_per_second")


def finished(folder: Path) -> dict[str, TrainingReport]:
    """The reports of the cells that ended well."""
    return {name: result.report for name, result in read_cells(folder).items() if result.report is not None}


def quality(folder: Path) -> list[dict[str, str]]:
    """The lines of `table.csv` without what depends on how busy the machine is."""
    with (folder / "table.csv").open() as file:
        return [{key: value for key, value in row.items() if key not in MEASURED} for row in csv.DictReader(file)]
