"""Which row is the teacher of another, and what share of its quality that other one has."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from left_trainer.comparison.rows import Row, TaskSummary
from left_trainer.comparison.run import Run
from left_trainer.runs.report import Scores

TEACHER = "teacher"  # a setting of this name teaches all that refer to no other
SHARE = "teacher_share"


def with_teacher_shares(rows: Sequence[Row], runs: Sequence[Run], tasks: Sequence[TaskSummary]) -> list[Row]:
    """The rows, each with its score as percent of the teacher's.

    The teacher is the setting that a run refers to. For runs that refer to none, such as those of a student that is
    trained alone, it is the setting called `teacher`, or the only one that others refer to. A model from elsewhere that
    a run has learned from stands in its report.

    Args:
        rows: In any order.
        runs: One run of each row.
        tasks: Those of the rows.
    """
    of_task = {task.name: task for task in tasks}
    return [
        row if row.is_reference else _with_share(row, run, _teacher(run, rows, runs), of_task[row.task])
        for row, run in zip(rows, runs, strict=True)
    ]


def share_of(score: float, best: float, is_lower_better: bool) -> float | None:
    """`score` as percent of `best`; of a metric of which less is better, `best` as percent of `score`."""
    part, whole = (best, score) if is_lower_better else (score, best)
    return 100 * part / whole if whole else None


def _teacher(run: Run, rows: Sequence[Row], runs: Sequence[Run]) -> Row | None:
    """The row of a run's teacher: of several on other models that of the same model, if there is one."""
    of_task = [(row, other) for row, other in zip(rows, runs, strict=True) if other.task == run.task]
    named = {other.label for _, other in of_task}
    referred = {name for _, other in of_task for name in other.teachers}
    if not run.teachers and _scores_of_teacher(run):
        return None
    labels = set(run.teachers) or ({TEACHER} & named) or referred
    found = [(row, other) for row, other in of_task if other.label in labels and not row.is_reference]
    same = [row for row, other in found if other.measured_on == run.measured_on]
    others = [row for row, _ in found]
    chosen = same or others
    return chosen[0] if len(chosen) == 1 else None


def _scores_of_teacher(run: Run) -> Scores:
    """Of a model that is no row."""
    return (run.report.teacher.metrics if run.report.teacher else None) or {}


def _with_share(row: Row, run: Run, teacher: Row | None, task: TaskSummary) -> Row:
    score = row.metrics.get(task.main_metric)
    found = teacher.metrics.get(task.main_metric) if teacher else None
    best = found.mean if found else _scores_of_teacher(run).get(task.main_metric)
    if score is None or score.mean is None or best is None:
        return row
    share = share_of(score.mean, best, task.main_metric in task.lower_is_better)
    return dataclasses.replace(row, values={**row.values, SHARE: share})
