"""From results to what the tables, the plots and the page show: one row for each method on each task."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from left_trainer.comparison.cell import BASE
from left_trainer.comparison.results import Result
from left_trainer.comparison.rows import COLUMNS, FAMILIES, Failure, Row, Score, Summary, TaskSummary, Value
from left_trainer.evaluation.scores import is_quality
from left_trainer.methods.registry import METHODS
from left_trainer.runs.report import Sample, Scores, TrainingReport
from left_trainer.runs.tuning import TuningResult
from left_trainer.tasks.registry import TASKS

# 97.5 percent quantiles of Student's t distribution by degrees of freedom; the normal distribution's beyond.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
SHOWN_PACKAGES = ("torch", "transformers", "peft", "trl")


@dataclass(frozen=True)
class Run:
    """A run that ended well.

    Args:
        task: Name of the task.
        is_base: Whether the model was scored as it is.
        conditions: What it was measured on.
        report: What it gave.
    """

    task: str
    is_base: bool
    conditions: Mapping[str, Any]
    report: TrainingReport

    @property
    def measured_on(self) -> tuple[str, str]:
        """What has to be equal for a run to be compared with the untrained model's scores."""
        return self.task, json.dumps(self.conditions, sort_keys=True)

    @property
    def group(self) -> tuple[Any, ...]:
        """Equal for runs that differ in nothing but the seed."""
        return (*self.measured_on, self.is_base, *(() if self.is_base else self.differs_by.values()))

    @property
    def differs_by(self) -> dict[str, Any]:
        """What may set a row apart from others, as it is called in the row's name."""
        report = self.report
        return {
            "method": report.method,
            "options": json.dumps(report.peft_kwargs, sort_keys=True),
            "batch size": report.train_batch_size,
            "steps": report.train_steps,
            "learning rate": report.learning_rate,
            "machine": report.machine,
            "model": self.conditions["base_model"],
        }


def summarize(results: Sequence[Result], title: str = "", command: str = "") -> Summary:
    """Everything that is shown.

    Args:
        results: Of comparable runs; trials of learning rates are left out.
        title: Of the page; by default made from what there is.
        command: That made the results.
    """
    shown = [result for result in results if result.cell.kind != "trial"]
    runs = [
        Run(result.cell.task, result.cell.kind == BASE, result.cell.conditions, result.report)
        for result in shown
        if result.report is not None
    ]
    tasks = tuple(dict.fromkeys(result.cell.task for result in shown))
    methods = tuple(dict.fromkeys(result.cell.method for result in shown if result.cell.kind != BASE))
    rows = sorted(_rows(runs), key=lambda row: (tasks.index(row.task), not row.is_base))
    return Summary(
        title=title or f"{_count(methods, 'method')} on {_count(tasks, 'task')}",
        model=", ".join(dict.fromkeys(result.cell.conditions["base_model"] for result in shown)),
        machines=tuple(dict.fromkeys(_environment(run.report) for run in runs)),
        command=command,
        seeds=tuple(sorted({result.cell.seed for result in shown})),
        families=FAMILIES,
        tasks=tuple(_task(name, [row for row in rows if row.task == name]) for name in tasks),
        columns=COLUMNS,
        rows=tuple(rows),
        failures=tuple(_failure(result) for result in shown if result.report is None),
    )


def interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Mean and 95 % interval of Student's t distribution over seeds; no interval for one value, no mean for none."""
    if not values:
        return None, None, None
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    degrees = len(values) - 1
    quantile = T_QUANTILES[degrees - 1] if degrees <= len(T_QUANTILES) else statistics.NormalDist().inv_cdf(0.975)
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def tuning_text(tuning: TuningResult) -> str:
    """How a learning rate was chosen, with what else was tried and what that cost."""
    tried = ", ".join(
        f"{trial.learning_rate:g}: {'no score' if trial.score is None else format(trial.score, '.1f')}"
        for trial in tuning.trials
    )
    return (
        f"tuned: best of {tuning.n_trials} by {tuning.metric} on the validation split ({tried}), "
        f"{tuning.train_steps} steps, {tuning.train_seconds:.0f} s of training"
    )


def _rows(runs: Sequence[Run]) -> list[Row]:
    bases = {run.measured_on: run.report for run in runs if run.is_base}
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    names = _names([group[0] for group in groups.values()])
    return [
        _row(name, group, bases.get(group[0].measured_on)) for name, group in zip(names, groups.values(), strict=True)
    ]


def _names(runs: Sequence[Run]) -> list[str]:
    """The method of each run, with what sets it apart from the others of the same method on the same task."""
    names = []
    for run in runs:
        method = run.report.method
        same = [other.differs_by for other in runs if (other.task, other.report.method) == (run.task, method)]
        parts = [
            f"{name} {value}" if name != "options" else str(value).strip("{}").replace('"', "") or "defaults"
            for name, value in run.differs_by.items()
            if any(other[name] != value for other in same)
        ]
        names.append(f"{method} ({', '.join(parts)})" if parts else method)
    return names


def _row(name: str, group: Sequence[Run], base: TrainingReport | None) -> Row:
    """The row of runs that differ in the seed."""
    task, is_base = group[0].task, group[0].is_base
    reports = [run.report for run in group]
    first = reports[0]
    record = None if is_base else METHODS.find(first.method)
    values = _base_values(base) | (_measured(reports) if is_base else _measured(reports) | _trained_values(reports))
    return Row(
        id=f"{task}/{name}",
        task=task,
        method=name,
        family=BASE if is_base else (record.family if record else "selective"),
        seeds=tuple(sorted(report.seed for report in reports)),
        values={column.key: values.get(column.key) for column in COLUMNS},
        metrics=_metrics([_scores(report) for report in reports], _scores(base)),
        curves=() if is_base else tuple(report.loss_history for report in reports),
        samples=_samples(first, base),
        notes=tuning_text(first.tuning) if first.tuning and not is_base else "",
    )


def _scores(report: TrainingReport | None) -> Scores:
    """Those of the trained model, or of the untrained one where that was scored alone."""
    if report is None:
        return {}
    return report.metrics.after or report.metrics.before or {}


def _metrics(scores: Sequence[Scores], base: Scores) -> dict[str, Score]:
    """The task's metrics over seeds."""
    found = {}
    for name in filter(is_quality, scores[0]):
        known = [value for score in scores if (value := score.get(name)) is not None]
        found[name] = Score(base.get(name), *interval(known))
    return found


def _base_values(base: TrainingReport | None) -> dict[str, Value]:
    """Figures of the untrained model. A row of that model itself shows them as before and after."""
    loss, general_loss = (_scores(base).get("loss"), base.general_loss) if base else (None, None)
    return {
        "test_loss_before": loss,
        "general_loss_before": general_loss,
        "test_loss_after": loss,
        "general_loss_after": general_loss,
    }


def _measured(reports: Sequence[TrainingReport]) -> dict[str, Value]:
    """Figures that every run has."""
    return {
        "total_parameters": reports[0].total_parameters,
        "peak_memory_generation_bytes": _mean(
            _above_start(report, report.peak_memory_bytes.eval) for report in reports
        ),
        "generation_samples_per_second": _mean(report.generation_samples_per_second for report in reports),
    }


def _trained_values(reports: Sequence[TrainingReport]) -> dict[str, Value]:
    """Figures that only training gives."""
    first = reports[0]
    peaks = (_above_start(report, report.peak_memory_bytes.train) for report in reports)
    return {
        "batch_size": first.train_batch_size,
        "train_steps": first.train_steps,
        "trainable_parameters": first.trainable_parameters,
        "trainable_percent": first.trainable_percent,
        "adapter_size_bytes": _mean(report.adapter_size_bytes for report in reports),
        "peak_memory_train_bytes": _mean(peaks),
        "train_steps_per_second": _mean(report.train_steps_per_second for report in reports),
        "target_tokens_per_second": _mean(report.train_target_tokens_per_second for report in reports),
        "test_loss_after": _mean(_scores(report).get("loss") for report in reports),
        "general_loss_after": _mean(report.general_loss for report in reports),
        "learning_rate": first.learning_rate,
        "learning_rate_source": first.learning_rate_source,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _above_start(report: TrainingReport, peak_bytes: int | None) -> int | None:
    """A peak above what the process had before the model was loaded. A GPU's counter starts at zero."""
    if peak_bytes is None or report.device != "cpu":
        return peak_bytes
    return peak_bytes - (report.memory_before_model_bytes or 0)


def _samples(report: TrainingReport, base: TrainingReport | None) -> tuple[Sample, ...]:
    """The predictions of a run beside those of the untrained model for the same rows."""
    before = {sample.source: sample.prediction for sample in (base.samples if base else ())}
    return tuple(
        Sample(
            source=sample.source,
            reference=sample.reference,
            before=before.get(sample.source) or "",
            after=sample.prediction or "",
        )
        for sample in report.samples
    )


def _task(name: str, rows: Sequence[Row]) -> TaskSummary:
    record = TASKS.find(name)
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.metrics))
    main = record.main_metric if record else next(iter(metrics), "")
    others = (metric for metric in metrics if metric != main)
    return TaskSummary(name, record.summary if record else "", main, (main, *others))


def _failure(result: Result) -> Failure:
    cell = result.cell
    return Failure(
        cell.task, BASE if cell.kind == BASE else cell.method, cell.seed, result.failure or "no reason known"
    )


def _environment(report: TrainingReport) -> str:
    packages = ", ".join(f"{name} {report.versions.get(name)}" for name in SHOWN_PACKAGES)
    return f"{report.machine}; Python {report.versions.get('python')}, {packages}"


def _count(items: Sequence[Any], noun: str) -> str:
    return f"{len(items)} {noun}" if len(items) == 1 else f"{len(items)} {noun}s"
