"""Runs the cells of a grid, each in a process of its own, and goes on where a killed comparison stopped."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

import torch

from left_trainer.comparison.cell import EXIT_WITH_PARENT, FAILURE_FILE, Cell, has_weights
from left_trainer.comparison.grid import Grid
from left_trainer.comparison.layout import Plan
from left_trainer.comparison.planned import arranged
from left_trainer.comparison.progress import LEAST_SECONDS, read_progress, remove_progress
from left_trainer.comparison.results import CELLS, Result, finished_cell
from left_trainer.comparison.settings import references
from left_trainer.evaluation.scores import is_lower_better
from left_trainer.processes import alone
from left_trainer.runs.json_records import write_json
from left_trainer.runs.report import REPORT_FILE, TrainingReport
from left_trainer.runs.tuning import Trial, TuningResult
from left_trainer.secret_values import masked
from left_trainer.tasks import Task, get_task

LOG_FILE = "log.txt"
MAX_WIDENINGS = 2  # of the learning rates of one method on one task


class Runner:
    """Runs cells below `output_dir`. An interrupt kills those that run.

    Args:
        output_dir: Each cell gets a folder in `output_dir/cells`.
        jobs: Number of cells at a time. Where several GPUs are visible, each job has one of them.
        on_result: Called with every result, finished earlier or now, from the thread that iterates.
        on_progress: Called with a cell that runs, what it is doing and where its log is, from the thread that waits for
            it.
        on_widen: Called with a trial that was not planned: the best learning rate is at the edge of those tried.
    """

    def __init__(
        self,
        output_dir: Path,
        jobs: int,
        on_result: Callable[[Result], None],
        on_progress: Callable[[Cell, str, Path], None],
        on_widen: Callable[[Cell], None],
    ) -> None:
        self.output_dir, self.jobs = output_dir, jobs
        self.on_result, self.on_progress, self.on_widen = on_result, on_progress, on_widen
        self._slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(jobs):
            self._slots.put(slot)
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopped = threading.Event()

    def run_grid(self, grid: Grid) -> None:
        """Score the untrained models, try learning rates, then run every setting with every seed.

        A setting runs after those whose results its arguments refer to.
        """
        self._run(grid.bases)
        done: dict[tuple[str, str, int], Cell] = {}
        for level in sorted({plan.level for plan in grid.plans}):
            plans = [bound(plan, done) for plan in grid.plans if plan.level == level]
            for cell in self._run_plans(plans, tuple(done.values())):
                done[cell.task, cell.label, cell.seed] = cell

    def _run_plans(self, plans: Sequence[Plan], before: Sequence[Cell]) -> list[Cell]:
        """Run trials, then runs; returns the latter. `before` are the cells that they may refer to."""
        added = [cell for plan in plans for cell in plan.trials]
        while added:
            self._renew(added, before)
            self._run(added)
            wider = [
                plan if self._is_done(plan) else widen(plan, _finished(plan.trials, self.output_dir)) for plan in plans
            ]
            added = [cell for old, new in zip(plans, wider, strict=True) for cell in new.trials[len(old.trials) :]]
            plans = wider
            for cell in added:
                self.on_widen(cell)
        runs = [cell for plan in plans for cell in tuned_runs(plan, self.output_dir)]
        self._renew(runs, before)
        self._run(runs)
        return runs

    def _renew(self, cells: Sequence[Cell], before: Sequence[Cell]) -> None:
        """Run those of `before` again that `cells` which are still to run refer to, where their weights are gone."""
        names = {name for cell in cells if not self._has_report(cell) for name in (cell.after or {}).values()}
        lost = [
            cell
            for cell in before
            if cell.name in names and self._has_report(cell) and not has_weights(self._folder(cell))
        ]
        if lost:
            for cell in lost:
                (self._folder(cell) / REPORT_FILE).unlink()
            self._renew(lost, before)
            self._run(lost)

    def _folder(self, cell: Cell) -> Path:
        return self.output_dir / CELLS / cell.name

    def _has_report(self, cell: Cell) -> bool:
        result = finished_cell(self._folder(cell))
        return result is not None and result.report is not None

    def _is_done(self, plan: Plan) -> bool:
        """Whether all runs of a plan are finished at the best learning rate that its trials give: these are kept."""
        return all(self._has_report(cell) for cell in tuned_runs(plan, self.output_dir))

    def _run(self, cells: Sequence[Cell]) -> None:
        for result in self._results(cells):
            self.on_result(result)

    def _results(self, cells: Sequence[Cell]) -> Iterator[Result]:
        left = []
        for cell in cells:
            done = finished_cell(self.output_dir / CELLS / cell.name)
            if done is not None and done.report is not None:
                yield done
            else:
                left.append(cell)
        waiting = [(cell, reason) for cell in left if (reason := self._why_not(cell)) is not None]
        without = {cell.name for cell, _ in waiting}
        left, reasons = arranged([cell for cell in left if cell.name not in without], self.output_dir, self.jobs)
        for cell, reason in (*waiting, *reasons):
            yield self._leave_out(cell, reason)
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                for future in as_completed([pool.submit(self._run_cell, cell) for cell in left]):
                    yield future.result()
            except BaseException:  # an interrupt, or an error of whoever takes the results
                self._stopped.set()
                for process in list(self._processes):
                    process.kill()
                raise

    def _why_not(self, cell: Cell) -> str | None:
        """Why a cell cannot be run: a setting whose result it refers to has none."""
        for name, folder in (cell.after or {}).items():
            result = finished_cell(self.output_dir / CELLS / folder)
            if result is None or result.report is None:
                return f"Left out: it refers to the result of {name!r}, which has none."
        return None

    def _leave_out(self, cell: Cell, reason: str) -> Result:
        """Note why a cell is not run; the next comparison asks again."""
        folder = self.output_dir / CELLS / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        cell.write(folder)
        write_json(folder / FAILURE_FILE, {"reason": reason})
        return Result(cell, None, reason)

    def _run_cell(self, cell: Cell) -> Result:
        """Run one cell from its beginning; a folder that an interrupted run left is emptied first."""
        if self._stopped.is_set():
            return Result(cell, None, "stopped")
        folder = self.output_dir / CELLS / cell.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        cell.write(folder)
        slot = self._slots.get()
        try:
            with self._start(folder, slot) as process:
                return_code = self._wait(process, cell, folder)
        finally:
            self._slots.put(slot)
            remove_progress(folder)
        if not self._stopped.is_set() and finished_cell(folder) is None:
            write_json(folder / FAILURE_FILE, {"reason": _reason(return_code, folder)})
        return finished_cell(folder) or Result(cell, None, "stopped")

    def _start(self, folder: Path, slot: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "left_trainer.comparison.cell", str(folder), EXIT_WITH_PARENT]
        with (folder / LOG_FILE).open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**alone(os.environ), **self._environment(slot)},
            )
        self._processes.add(process)
        return process

    def _wait(self, process: subprocess.Popen[bytes], cell: Cell, folder: Path) -> int:
        """Wait for a process to end, and tell what it is doing meanwhile. Returns its exit code."""
        said = None
        while True:
            doing = read_progress(folder) or "starting"
            if doing != said:
                self.on_progress(cell, doing, folder / LOG_FILE)
                said = doing
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=LEAST_SECONDS)

    def _environment(self, slot: int) -> dict[str, str]:
        if torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            devices = visible if visible != [""] else [str(index) for index in range(torch.cuda.device_count())]
            return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]}
        if self.jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs))}
        return {}


def bound(plan: Plan, done: Mapping[tuple[str, str, int], Cell]) -> Plan:
    """The plan with the cells that it refers to: each run with that of its task and its own seed.

    Args:
        plan: Of a setting that may refer to others.
        done: Cells that have been run, by task, setting and seed.
    """

    def bind(cell: Cell) -> Cell:
        names = references(cell.arguments).values()
        return replace(cell, after={name: done[cell.task, name, cell.seed].name for name in names} or None)

    return replace(plan, trials=tuple(map(bind, plan.trials)), runs=tuple(map(bind, plan.runs)))


def tuned_runs(plan: Plan, output_dir: Path) -> list[Cell]:
    """The runs of a plan with the learning rate that its trials found best, the default where all trials failed."""
    task = get_task(plan.runs[0].task)
    metric = task.main_metric
    reports = _finished(plan.trials, output_dir)
    best = best_learning_rate(reports, task)
    if best is None:
        return list(plan.runs)
    edge = edge_of(best, plan)
    tuning = TuningResult(
        metric=metric,
        n_trials=len(plan.trials),
        trials=tuple(
            Trial(rate, _after(report, metric), report.train_steps, _train_seconds(report))
            for rate, report in reports.items()
        ),
        train_steps=sum(report.train_steps for report in reports.values()),
        train_seconds=sum(_train_seconds(report) or 0 for report in reports.values()),
        n_widenings=plan.n_widenings,
        edge=edge,
    )
    return [replace(cell, arguments={**cell.arguments, "learning_rate": best}, tuning=tuning) for cell in plan.runs]


def widen(plan: Plan, reports: Mapping[float, TrainingReport]) -> Plan:
    """The plan with one more trial beyond the best learning rate, where that is at the edge of those tried.

    The distance is that of the two rates at the edge. At most `MAX_WIDENINGS` are added; where the trial beyond the
    best fails or diverges, the best is at no edge.

    Args:
        plan: Its trials have been run.
        reports: Of the trials that ended well, by learning rate.
    """
    best = best_learning_rate(reports, get_task(plan.runs[0].task))
    edge = edge_of(best, plan) if best is not None else None
    if edge is None or plan.n_widenings == MAX_WIDENINGS:
        return plan
    rates = _rates(plan)
    beyond = rates[-1] ** 2 / rates[-2] if edge == "highest" else rates[0] ** 2 / rates[1]
    first = plan.trials[0]
    trial = replace(first, arguments={**first.arguments, "learning_rate": float(f"{beyond:.3g}")})
    return replace(plan, trials=(*plan.trials, trial), n_widenings=plan.n_widenings + 1)


def edge_of(rate: float, plan: Plan) -> Literal["lowest", "highest"] | None:
    """At which edge of the learning rates that were tried `rate` is; at none where only one was."""
    rates = _rates(plan)
    if len(rates) < 2:
        return None
    return "lowest" if rate == rates[0] else "highest" if rate == rates[-1] else None


def _rates(plan: Plan) -> list[float]:
    """The learning rates of a plan's trials, those that failed included, rising."""
    return sorted({cell.arguments["learning_rate"] for cell in plan.trials})


def _finished(trials: Sequence[Cell], output_dir: Path) -> dict[float, TrainingReport]:
    """Reports of the trials that ended well, by learning rate."""
    results = [(cell, finished_cell(output_dir / CELLS / cell.name)) for cell in trials]
    return {cell.arguments["learning_rate"]: result.report for cell, result in results if result and result.report}


def best_learning_rate(reports: Mapping[float, TrainingReport], task: Task) -> float | None:
    """That with the best score, of equal ones that with the lowest loss; those that diverged do not count."""
    metric = task.main_metric
    sign = -1 if is_lower_better(metric, task.lower_is_better) else 1
    scored = [(rate, _after(report, metric), _after(report, "loss")) for rate, report in reports.items()]
    usable = [(sign * score, -loss, rate) for rate, score, loss in scored if score is not None and loss is not None]
    return max(usable, key=lambda item: item[:2])[-1] if usable else None


def _train_seconds(report: TrainingReport) -> float | None:
    """Of the optimizer steps alone."""
    return report.train_steps / report.train_steps_per_second if report.train_steps_per_second else None


def _after(report: TrainingReport, name: str) -> float | None:
    return (report.metrics.after or {}).get(name)


def _reason(return_code: int, folder: Path) -> str:
    """Why a process ended without a word of its own."""
    if return_code < 0:
        name = signal.Signals(-return_code).name
        hint = " (often: the machine's memory was used up)" if name == "SIGKILL" else ""
        return f"The process was killed by {name}{hint}."
    lines = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").strip().split("\n")
    return f"The process ended with exit code {return_code}: {masked(lines[-1].strip()) or 'it printed nothing'}"
