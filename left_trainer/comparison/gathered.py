"""The results in a comparison's folder, whether those who work on it have ended or not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from left_trainer.comparison.plan_file import PLAN_FILE, PlanFile
from left_trainer.comparison.results import CELLS, RESULTS_FILE, Result, read_cells, read_results
from left_trainer.comparison.schedule import FinishedCells, make_schedule


@dataclass(frozen=True)
class Gathered:
    """What is in a folder.

    Args:
        results: Those of the plan in its order, then those of earlier comparisons.
        n_left: Runs of the plan that are not finished.
    """

    results: tuple[Result, ...]
    n_left: int


def gather(output_dir: Path) -> Gathered:
    """Read the folders of a plan's cells, and `results.jsonl` for what has no folder.

    Raises:
        FileNotFoundError: There is neither a plan nor `results.jsonl`.
        ValueError: A file that no comparison wrote.
    """
    if not (output_dir / PLAN_FILE).is_file():
        return Gathered(tuple(read_results(output_dir)), 0)
    finished = FinishedCells(output_dir)
    schedule = make_schedule(PlanFile.read(output_dir).grid, finished)
    own = [(cell, finished(cell)) for cell in schedule.cells]
    found = {cell.name: result for cell, result in own if result is not None}
    for name, result in read_cells(output_dir).items():
        if result.report is not None:
            found.setdefault(name, result)
    if (output_dir / RESULTS_FILE).is_file():
        for result in read_results(output_dir):
            if not (output_dir / CELLS / result.cell.name).exists():
                found.setdefault(result.cell.name, result)
    n_left = sum(cell.name not in found for cell in schedule.cells) + schedule.n_unknown
    return Gathered(tuple(found.values()), n_left)
