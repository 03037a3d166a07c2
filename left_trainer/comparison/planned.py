"""Which cells fit on the device, and in which order they run: the cheapest first, so that results come early."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from left_trainer.callbacks.tables import format_bytes
from left_trainer.comparison.cell import BASE, Cell
from left_trainer.comparison.results import CELLS
from left_trainer.models import load_tokenizer
from left_trainer.planning.before_run import RunPlanner
from left_trainer.planning.devices import find_device
from left_trainer.planning.lengths import RowLengths, task_lengths
from left_trainer.planning.plan import TrainingPlan
from left_trainer.runs.fine_tuning import with_task_settings
from left_trainer.tasks import get_task
from left_trainer.trainer.checks import Request
from left_trainer.trainer.preparation import free_positions, method_of

# What orders cells where the speed of the device is not known: methods keep their order from one GPU to the next.
STANDING_IN = "a10g"
# Arguments that a plan does not depend on: cells that differ in no other one share it.
WITHOUT_EFFECT = ("seed", "learning_rate")


class Arranger:
    """Tells which cells fit on this machine, and orders them, the cheapest first.

    Cells that only score, or cannot be planned, come first and are not left out.

    Args:
        output_dir: Of the comparison.
        jobs: Cells that run at a time and share the devices.
    """

    def __init__(self, output_dir: Path, jobs: int = 1) -> None:
        self.output_dir, self.jobs = output_dir, jobs
        self._found: dict[str, tuple[float, str | None]] = {}
        self._lengths: dict[str, RowLengths | None] = {}
        self._memory_bytes = 0

    def __call__(self, cells: Sequence[Cell]) -> tuple[list[Cell], list[tuple[Cell, str]]]:
        """The cells that fit, in order, and those that do not with the reason."""
        costs, reasons = {}, []
        for cell in cells:
            key = _key(cell)
            if key not in self._found:
                self._found[key] = self._judged(cell.placed(self.output_dir / CELLS))
            costs[cell.name], reason = self._found[key]
            if reason is not None:
                reasons.append((cell, reason))
        left_out = {cell.name for cell, _ in reasons}
        kept = [cell for cell in cells if cell.name not in left_out]
        return sorted(kept, key=lambda cell: costs[cell.name]), reasons

    def _judged(self, cell: Cell) -> tuple[float, str | None]:
        """Seconds of a step, and why the cell does not fit."""
        if cell.kind == BASE:
            return 0.0, None
        try:
            planner = _planner(cell, self.output_dir, self._lengths)
            plan = planner()
            seconds = _seconds(plan, planner)
        except Exception:  # what is wrong with a cell, its own process says
            return 0.0, None
        # What is free while a run is going on is not all that there is.
        self._memory_bytes = max(self._memory_bytes, planner.device.memory_bytes)
        n_devices = torch.cuda.device_count() if planner.device.kernels == "cuda" else 1
        share = self._memory_bytes // -(-self.jobs // max(n_devices, 1))
        if plan.fits(share) or planner.args.ignore_plan or cell.launcher:  # several processes may share the model
            return seconds, None
        where = planner.device.name + (f" with {self.jobs} jobs" if self.jobs > 1 else "")
        return seconds, (
            f"Left out: the run needs {format_bytes(plan.run_bytes)}, and there are {format_bytes(share)} on {where}. "
            "--ignore_plan runs it all the same."
        )


def why_not_here(cell: Cell, output_dir: Path) -> str | None:
    """Why a cell does not fit on this machine; `None` where it does."""
    _, reasons = Arranger(output_dir)([cell])
    return reasons[0][1] if reasons else None


def _key(cell: Cell, without: Sequence[str] = WITHOUT_EFFECT) -> str:
    arguments = {name: value for name, value in cell.arguments.items() if name not in without}
    return json.dumps([cell.kind == BASE, cell.task, arguments], sort_keys=True, default=str)


def _planner(cell: Cell, output_dir: Path, lengths: dict[str, RowLengths | None]) -> RunPlanner:
    task = get_task(cell.task)
    model_args, data_args, args = cell.parse(output_dir)
    args = with_task_settings(task, args)
    source = model_args.source(args)
    request = Request(source, args, method_of(source, args, None))
    rows = _key(cell, (*WITHOUT_EFFECT, "peft_method", "peft_kwargs"))
    if rows not in lengths:
        lengths[rows] = task_lengths(task, data_args, source, load_tokenizer(source))
    free = free_positions(request, args.peft_options).at_most(args.max_length)
    counted = lengths[rows]
    return RunPlanner(request, args.peft_options, counted and counted.cut(source.family, *free))


def _seconds(plan: TrainingPlan, planner: RunPlanner) -> float:
    is_known = planner.device.bandwidth is not None
    return plan.time_on(planner.device if is_known else find_device(STANDING_IN)).seconds
