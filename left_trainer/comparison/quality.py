"""How well the runs of a task did: their scores, the intervals of these, and what they depend on."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

from left_trainer.comparison.results import Result
from left_trainer.comparison.rows import Score, TaskSummary
from left_trainer.evaluation.intervals import over_seeds
from left_trainer.evaluation.scores import is_lower_better, is_quality
from left_trainer.runs.report import Scores, TrainingReport
from left_trainer.tasks.registry import TASKS


def summarize_task(name: str, results: Sequence[Result]) -> TaskSummary:
    """A task's metrics, and what the scores of all its runs depend on."""
    record = TASKS.find(name)
    reports = [result.report for result in results if result.report is not None]
    metrics = list(dict.fromkeys(metric for report in reports for metric in scores_over_seeds([report], {})))
    main = record.main_metric if record else next(iter(metrics), "")
    shown = (main, *(metric for metric in metrics if metric != main))
    lower = record.lower_is_better if record else ()
    return TaskSummary(
        name=name,
        summary=record.summary if record else "",
        main_metric=main,
        metrics=shown,
        lower_is_better=tuple(metric for metric in shown if is_lower_better(metric, lower)),
        settings=_settings(results),
    )


def _settings(results: Sequence[Result]) -> dict[str, str]:
    """What all runs of a task have in common; several values where runs were mixed on purpose."""
    cells = [result.cell for result in results]
    values: dict[str, list[Any]] = {
        "test rows": [result.report.test_rows if result.report else None for result in results],
        "prompt": [json.dumps(cell.conditions.get("prompt"), ensure_ascii=False) for cell in cells],
        "beams": [cell.conditions.get("num_beams") for cell in cells],
        "new tokens at most": [cell.conditions.get("max_new_tokens") for cell in cells],
        "input tokens at most": [cell.arguments.get("max_length") or "as the model has" for cell in cells],
    }
    distinct = {
        title: dict.fromkeys(str(value) for value in found if value is not None) for title, found in values.items()
    }
    return {title: " / ".join(found) for title, found in distinct.items() if found}


def scores_of(report: TrainingReport | None) -> Scores:
    """Those of the trained model, or of the untrained one where that was scored alone."""
    if report is None:
        return {}
    return report.metrics.after or report.metrics.before or {}


def scores_over_seeds(reports: Sequence[TrainingReport], base: Scores) -> dict[str, Score]:
    """The task's metrics, each with its interval: over seeds, or over rows where there is one seed."""
    scores, main = [scores_of(report) for report in reports], _main_metric(reports[0].task)
    found = {}
    for name in scores[0]:
        if name != main and not is_quality(name):
            continue
        known = [value for score in scores if (value := score.get(name)) is not None]
        mean = statistics.fmean(known) if known else None
        if len(reports) == 1 and name == main and (rows := reports[0].score_interval):
            found[name] = Score(base.get(name), mean, rows.low, rows.high, "rows")
        elif seeds := over_seeds(known):
            found[name] = Score(base.get(name), mean, seeds.low, seeds.high, "seeds")
        else:
            found[name] = Score(base.get(name), mean, None, None, None)
    return found


def _main_metric(task: str) -> str | None:
    record = TASKS.find(task)
    return record.main_metric if record else None
