"""The order in which rows and methods are shown: the best first."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from left_trainer.comparison.rows import Failure, Row, TaskSummary


def ranked(rows: Iterable[Row], task: TaskSummary) -> tuple[Row, ...]:
    """The rows of one task: references as they come, then methods by the task's main metric, the best first."""
    rows = [row for row in rows if row.task == task.name]
    return tuple(sorted(rows, key=lambda row: (not row.is_reference, 0 if row.is_reference else -task.quality(row))))


def by_mean_place(ranked_rows: Mapping[str, Sequence[Row]], failures: Sequence[Failure]) -> tuple[str, ...]:
    """Names of rows for all tasks together: references first, then methods by their mean place, the best first.

    A method that has no score on a task takes the place after the last there.

    Args:
        ranked_rows: The rows of each task as `ranked` returns them.
        failures: Runs that failed, of methods that may have no row at all.
    """
    rows = [row for task_rows in ranked_rows.values() for row in task_rows]
    references = dict.fromkeys(row.method for row in rows if row.is_reference)
    names = dict.fromkeys([*(row.method for row in rows), *(failure.method for failure in failures)])
    methods = [name for name in names if name not in references]

    def mean_place(method: str) -> float:
        places = []
        for task_rows in ranked_rows.values():
            order = [row.method for row in task_rows if not row.is_reference]
            places.append(order.index(method) if method in order else len(order))
        return statistics.fmean(places) if places else 0

    return (*references, *sorted(methods, key=mean_place))
