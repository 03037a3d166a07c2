"""Which cells a comparison has by now, and how far each is: read from its folder, the same for all who read it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from left_trainer.comparison.cell import FAILURE_FILE, Cell
from left_trainer.comparison.grid import Grid
from left_trainer.comparison.layout import Plan
from left_trainer.comparison.results import CELLS, Result, finished_cell
from left_trainer.comparison.tuned import bound, tuned_runs, widen
from left_trainer.runs.report import REPORT_FILE, TrainingReport

Finished = Callable[[Cell], Result | None]


@dataclass(frozen=True)
class Schedule:
    """The cells of a comparison.

    Args:
        cells: Those that are known, in the order of the grid: bases, then for each plan its trials and its runs.
        added: Trials among them that the grid does not have: the best learning rate was at the edge of those tried.
        n_unknown: Runs that are known once the trials before them have ended.
        needed_later: Names of the cells whose results such runs refer to.
    """

    cells: tuple[Cell, ...]
    added: tuple[Cell, ...]
    n_unknown: int
    needed_later: frozenset[str]

    @functools.cached_property
    def by_name(self) -> Mapping[str, Cell]:
        """The known cells."""
        return {cell.name: cell for cell in self.cells}

    def before(self, cell: Cell) -> dict[str, Cell]:
        """The cells whose results a cell refers to, by the name of their setting."""
        return {name: self.by_name[folder] for name, folder in (cell.after or {}).items()}


class FinishedCells:
    """The results below a comparison's folder, each read once for as long as its file stays the same."""

    def __init__(self, output_dir: Path) -> None:
        self.cells = output_dir / CELLS
        self._read: dict[str, tuple[int, Result]] = {}

    def __call__(self, cell: Cell) -> Result | None:
        """The result of a cell, with its failure where it failed; `None` where it has not been run to its end."""
        folder = self.cells / cell.name
        written = _written(folder)
        if written is None:
            return None
        known = self._read.get(cell.name)
        if known is None or known[0] != written:
            result = finished_cell(folder)
            if result is None:
                return None
            known = self._read[cell.name] = written, result
        return known[1]


def make_schedule(grid: Grid, finished: Finished) -> Schedule:
    """The cells that follow from a grid and from what has been run."""
    cells, added, n_unknown = list(grid.bases), list[Cell](), 0
    runs_of: dict[tuple[str, str, int], Cell] = {}
    needed_later: set[str] = set()
    for planned in sorted(grid.plans, key=lambda plan: plan.level):
        plan = bound(planned, runs_of)
        if plan is None:
            n_unknown += len(planned.trials) + len(planned.runs)
            continue
        plan = _widened(plan, finished)
        cells += plan.trials
        added += plan.trials[len(planned.trials) :]
        if not _have_ended(plan.trials, finished):
            n_unknown += len(plan.runs)
            needed_later.update(name for cell in plan.runs for name in (cell.after or {}).values())
            continue
        runs = tuned_runs(plan, _reports(plan.trials, finished))
        cells += runs
        runs_of.update({(cell.task, cell.label, cell.seed): cell for cell in runs})
    return Schedule(tuple(cells), tuple(added), n_unknown, frozenset(needed_later))


def why_never(cell: Cell, schedule: Schedule, finished: Finished) -> str | None:
    """Why a cell cannot be run: a setting whose result it refers to has ended without one."""
    for name, before in schedule.before(cell).items():
        result = finished(before)
        if result is not None and result.report is None:
            return f"Left out: it refers to the result of {name!r}, which has none."
    return None


def is_ready(cell: Cell, schedule: Schedule, finished: Finished) -> bool:
    """Whether the results that a cell refers to are there."""
    results = map(finished, schedule.before(cell).values())
    return all(result is not None and result.report is not None for result in results)


def _widened(plan: Plan, finished: Finished) -> Plan:
    """The plan with trials beyond the best learning rate, unless its runs are finished: these are kept."""
    while _have_ended(plan.trials, finished):
        reports = _reports(plan.trials, finished)
        if all((result := finished(cell)) and result.report for cell in tuned_runs(plan, reports)):
            return plan
        wider = widen(plan, reports)
        if wider is plan:
            return plan
        plan = wider
    return plan


def _have_ended(cells: Sequence[Cell], finished: Finished) -> bool:
    return all(finished(cell) is not None for cell in cells)


def _reports(trials: Sequence[Cell], finished: Finished) -> dict[float, TrainingReport]:
    """Reports of the trials that ended well, by learning rate."""
    results = [(cell, finished(cell)) for cell in trials]
    return {cell.arguments["learning_rate"]: result.report for cell, result in results if result and result.report}


def _written(folder: Path) -> int | None:
    """When the result in a folder was written; `None` where there is none."""
    for name in (REPORT_FILE, FAILURE_FILE):
        try:
            return (folder / name).stat().st_mtime_ns
        except OSError:
            continue
    return None
