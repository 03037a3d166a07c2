"""Works on the cells of a planned comparison, beside any number of other processes, until all are finished.

What is to do is read from the folder again and again, and a cell is run by the process that has its claim. So a process
may start, end or die at any time, on any machine, and the result is the same.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from left_trainer.comparison.attempt import LOG_FILE, Attempt
from left_trainer.comparison.cell import FAILURE_FILE, Cell, has_weights
from left_trainer.comparison.claims import TAKEOVER_SECONDS, Claim, ClaimWatch, last_claim, n_lost
from left_trainer.comparison.engines import Engine, Pending
from left_trainer.comparison.grid import Grid
from left_trainer.comparison.plan_file import PlanFile
from left_trainer.comparison.planned import Arranger
from left_trainer.comparison.progress import read_progress
from left_trainer.comparison.results import CELLS, Result
from left_trainer.comparison.schedule import FinishedCells, Schedule, is_ready, make_schedule, why_never
from left_trainer.runs.json_records import write_json
from left_trainer.runs.report import REPORT_FILE
from left_trainer.storage import owners

LOOK_SECONDS = 2.0  # between two looks for what other processes have done
ENDING_SECONDS = 10.0
ATTEMPTS = 3


@dataclass(frozen=True)
class Terms:
    """What a process may decide for the others.

    Args:
        leaves_out: Note as failed what does not fit on this machine, where others would run it.
        takeover_seconds: The silence after which others may take the cells of this process.
        attempts: Processes that a cell may take with it before it counts as failed.
    """

    leaves_out: bool = True
    takeover_seconds: float = TAKEOVER_SECONDS
    attempts: int = ATTEMPTS


class Worker:
    """Runs the cells of a plan through an engine.

    Args:
        output_dir: Of the comparison.
        plan: What is to run.
        engine: What runs it.
        terms: Beside other processes.
        on_result: Called with every result of the plan, whoever ran it, once.
        on_progress: Called with a cell that the engine runs, what it is doing and where its log is.
        on_added: Called with a trial that was not planned: the best learning rate is at the edge of those tried.
    """

    def __init__(
        self,
        output_dir: Path,
        plan: PlanFile,
        engine: Engine,
        terms: Terms,
        on_result: Callable[[Result], None],
        on_progress: Callable[[Cell, str, Path], None] = lambda *_: None,
        on_added: Callable[[Cell], None] = lambda _: None,
    ) -> None:
        self.output_dir, self.plan, self.engine, self.terms = output_dir, plan, engine, terms
        self.on_result, self.on_progress, self.on_added = on_result, on_progress, on_added
        self._finished = FinishedCells(output_dir)
        self._watch = ClaimWatch(terms.takeover_seconds)
        self._arrange = Arranger(output_dir, engine.jobs or 1)
        self._pending: dict[str, tuple[Cell, Pending]] = {}
        self._errors: Counter[str] = Counter()
        self._told_results: set[str] = set()
        self._told_added: set[str] = set()
        self._doing: dict[str, str] = {}
        self.schedule = make_schedule(plan.grid, self._finished)
        self.too_large: dict[str, str] = {}

    def run(self) -> bool:
        """Run what there is to run. Returns whether all cells are finished: if not, `too_large` says why."""
        with self.engine:
            while True:
                self.schedule = make_schedule(self.plan.grid, self._finished)
                self._tell()
                left = [cell for cell in self.schedule.cells if self._finished(cell) is None]
                if not left and not self.schedule.n_unknown:
                    self._let_end()
                    return True
                is_changed, is_worth_waiting = self._start(left)
                if not is_changed and not is_worth_waiting:
                    return False
                if not is_changed:
                    self._wait()

    def results(self) -> list[Result]:
        """Those that were told of, in the order of the plan."""
        found = [self._finished(cell) for cell in self.schedule.cells if cell.name in self._told_results]
        return [result for result in found if result is not None]

    def folder(self, cell: Cell) -> Path:
        """Where the cell and its result are."""
        return self.output_dir / CELLS / cell.name

    def _tell(self) -> None:
        """Tell what is new, in the order of the plan."""
        for cell in self.schedule.added:
            if cell.name not in self._told_added:
                self._told_added.add(cell.name)
                self.on_added(cell)
        for cell in self.schedule.cells:
            result = self._finished(cell)
            if result is not None and cell.name not in self._told_results:
                self._told_results.add(cell.name)
                self.on_result(result)

    def _start(self, left: Sequence[Cell]) -> tuple[bool, bool]:
        """Start what is ready and free, as far as there is room.

        Returns:
            Whether that ended a cell without running it, and whether there is anything to wait for.
        """
        room = len(left) if self.engine.jobs is None else self.engine.jobs - len(self._pending)
        if room <= 0:
            return False, True
        free: dict[str, Claim] = {}
        reasons: dict[str, str | None] = {}
        others_run = False
        for cell in left:
            reasons[cell.name] = why_never(cell, self.schedule, self._finished)
            if cell.name in self._pending or not is_ready(cell, self.schedule, self._finished):
                continue
            claim = self._watch.free(self.folder(cell))
            if claim is None:
                others_run = True
            elif (reason := self._why_given_up(cell)) is not None:
                reasons[cell.name] = reason
            else:
                free[cell.name] = claim
        chosen, too_large = self._arranged([cell for cell in left if cell.name in free])
        if self.terms.leaves_out:
            reasons |= too_large
        else:
            self.too_large = too_large
        given_up = [(cell, reason) for cell in left if (reason := reasons.get(cell.name)) is not None]
        for cell, reason in given_up:
            self._leave_out(cell, reason)
        for cell in chosen[:room]:
            self._submit(cell, free[cell.name])
        return bool(given_up), others_run or bool(self._pending)

    def _arranged(self, cells: Sequence[Cell]) -> tuple[list[Cell], dict[str, str]]:
        """The cells that may run, the cheapest first, and why the others do not fit here."""
        kept, reasons = self._arrange(cells)
        if not self.engine.is_here:  # what does not fit here may fit there, where the attempt asks again
            return [*kept, *(cell for cell, _ in reasons)], {}
        return kept, {cell.name: reason for cell, reason in reasons}

    def _why_given_up(self, cell: Cell) -> str | None:
        """Why a cell is not tried again: too many processes were lost while they ran it, or could not run it."""
        folder = self.folder(cell)
        last, lost = last_claim(folder), n_lost(folder)
        if last is not None and lost >= self.terms.attempts:
            owner = last.owner()
            where = f", the last one on {owner.host}" if owner else ""
            return (
                f"The process that ran it was lost {lost} times{where}: killed, or silent for too long (often: the "
                "machine's memory was used up, or its time was over)."
            )
        return None

    def _submit(self, cell: Cell, claim: Claim) -> None:
        self.folder(cell).mkdir(parents=True, exist_ok=True)
        cell.write(self.folder(cell))
        working_dir = self.plan.working_dir if Path(self.plan.working_dir).is_dir() else None
        claim = Claim(claim.cell_folder.absolute(), claim.number)
        attempt = Attempt(claim, cell, self.terms.takeover_seconds, working_dir, checks_memory=not self.engine.is_here)
        self._pending[cell.name] = cell, self.engine.submit(attempt)

    def _leave_out(self, cell: Cell, reason: str) -> None:
        """Note why a cell is not run; whoever plans the comparison again asks again."""
        self.folder(cell).mkdir(parents=True, exist_ok=True)
        cell.write(self.folder(cell))
        write_json(self.folder(cell) / FAILURE_FILE, {"reason": reason})

    def _wait(self) -> None:
        """Wait until an attempt ends, or until it is time to look what other processes have done."""
        until = time.monotonic() + LOOK_SECONDS
        while time.monotonic() < until:
            ended = [name for name, (_, pending) in self._pending.items() if pending.done()]
            for name in ended:
                self._end(*self._pending.pop(name))
            if ended:
                return
            for cell, _ in self._pending.values():
                self._tell_progress(cell)
            time.sleep(self.engine.tick_seconds)

    def _let_end(self) -> None:
        """Leave attempts whose results are there the time to end; one that waits in a queue for nothing is stopped."""
        until = time.monotonic() + ENDING_SECONDS
        while self._pending and time.monotonic() < until:
            self._wait()

    def _end(self, cell: Cell, pending: Pending) -> None:
        """Take note of an attempt that has ended: an error is the engine's own, such as a node that is lost."""
        try:
            pending.result()
        except Exception as error:
            if self.engine.is_here:
                raise
            self._errors[cell.name] += 1
            if self._errors[cell.name] >= self.terms.attempts and self._finished(cell) is None:
                self._leave_out(cell, f"The engine could not run it, {type(error).__name__}: {error}")

    def _tell_progress(self, cell: Cell) -> None:
        claim = last_claim(self.folder(cell))
        owner = claim.owner() if claim else None
        if claim is None or owner is None:
            return
        where = "" if self.engine.is_here else f" on {owner.host}"
        doing = (read_progress(claim.run_folder) or "starting") + where
        if self._doing.get(cell.name) != doing:
            self._doing[cell.name] = doing
            self.on_progress(cell, doing, self.folder(cell) / LOG_FILE)


def prepare(plan: PlanFile, output_dir: Path) -> Schedule:
    """Write the plan and the cells that are known, and forget what failed, so that it is tried again.

    A result that others refer to and whose weights are gone counts as not there, where one of these is still to run.
    """
    finished = FinishedCells(output_dir)
    _forget_lost_weights(plan.grid, output_dir, finished)
    schedule = make_schedule(plan.grid, finished)
    for cell in schedule.cells:
        folder = output_dir / CELLS / cell.name
        result = finished(cell)
        if result is not None and result.report is not None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        last = last_claim(folder)
        owner = last.owner() if last else None
        if last and (result is not None or (owner and owners.has_ended(owner.process))):
            last.release()
        (folder / FAILURE_FILE).unlink(missing_ok=True)
        cell.write(folder)
    plan.write(output_dir)
    return make_schedule(plan.grid, finished)


def _forget_lost_weights(grid: Grid, output_dir: Path, finished: FinishedCells) -> None:
    """Remove the reports of results without weights that a setting which is not finished refers to."""
    while True:
        schedule = make_schedule(grid, finished)
        lost = list(_lost(grid, schedule, finished, output_dir))
        for cell in lost:
            (output_dir / CELLS / cell.name / REPORT_FILE).unlink()
        if not lost:
            return


def _lost(grid: Grid, schedule: Schedule, finished: FinishedCells, output_dir: Path) -> Iterator[Cell]:
    left = [cell for cell in schedule.cells if not _has_report(cell, finished)]
    needed = {name for cell in left for name in (cell.after or {}).values()} | schedule.needed_later
    for name in sorted(needed):
        cell = schedule.by_name[name]
        if _has_report(cell, finished) and not has_weights(output_dir / CELLS / name):
            yield cell


def _has_report(cell: Cell, finished: FinishedCells) -> bool:
    result = finished(cell)
    return result is not None and result.report is not None
