"""From results to what the tables, the plots and the page show: one row for each method on each task."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from left_trainer.comparison.cell import BASE
from left_trainer.comparison.quality import scores_of, scores_over_seeds, summarize_task
from left_trainer.comparison.ranking import by_mean_place, ranked
from left_trainer.comparison.results import Result
from left_trainer.comparison.rows import (
    COLUMNS,
    FAMILIES,
    MAJORITY,
    WHERE_ROWS_DIFFER,
    Column,
    Failure,
    Row,
    Score,
    Summary,
    TaskSummary,
    Value,
)
from left_trainer.comparison.run import Run, names_of, rows_of
from left_trainer.comparison.teachers import with_teacher_shares
from left_trainer.methods.registry import METHODS
from left_trainer.runs.report import Sample, TrainingReport
from left_trainer.runs.tuning import TuningResult

SHOWN_PACKAGES = ("torch", "transformers", "peft", "trl")


def summarize(
    results: Sequence[Result], title: str = "", command: str = "", predictions: Mapping[str, str] | None = None
) -> Summary:
    """Everything that is shown.

    Args:
        results: Of comparable runs; trials of learning rates are left out.
        title: Of the page; by default made from what there is.
        command: That made the results.
        predictions: Where the predictions of a cell are, by the cell's name.
    """
    predictions = predictions or {}
    shown = [result for result in results if result.cell.kind != "trial"]
    runs = [
        Run.of(result, result.report, predictions.get(result.cell.name, ""))
        for result in shown
        if result.report is not None
    ]
    tasks = tuple(
        summarize_task(name, [result for result in shown if result.cell.task == name])
        for name in dict.fromkeys(result.cell.task for result in shown)
    )
    labels = tuple(dict.fromkeys(result.cell.label for result in shown if result.cell.kind != BASE))
    noun = "setting" if any(result.cell.setting for result in shown) else "method"
    rows = _rows(runs, tasks)
    places = {task.name: ranked(rows, task) for task in tasks}
    failures = tuple(_failure(result) for result in shown if result.report is None)
    return Summary(
        title=title or f"{_count(labels, noun)} on {_count(tasks, 'task')}",
        model=", ".join(dict.fromkeys(result.cell.conditions["base_model"] for result in shown)),
        machines=tuple(_environments([run.report for run in runs])),
        command=command,
        run_seconds=_total_seconds(results),
        seeds=tuple(sorted({result.cell.seed for result in shown})),
        families=FAMILIES,
        tasks=tasks,
        columns=_columns(rows),
        methods=by_mean_place(places, failures),
        rows=tuple(row for ranked in places.values() for row in ranked),
        failures=failures,
    )


def _columns(rows: Sequence[Row]) -> tuple[Column, ...]:
    """All of them but those in which rows could differ and do not."""

    def differs(key: str) -> bool:
        return len({row.values[key] for row in rows if row.values[key] is not None}) > 1

    return tuple(column for column in COLUMNS if column.key not in WHERE_ROWS_DIFFER or differs(column.key))


def tuning_text(tuning: TuningResult) -> str:
    """How a learning rate was chosen, with what else was tried and what that cost."""
    tried = ", ".join(
        f"{trial.learning_rate:g}: {'no score' if trial.score is None else format(trial.score, '.1f')}"
        for trial in tuning.trials
    )
    text = (
        f"tuned: best of {tuning.n_trials} by {tuning.metric} on the validation split ({tried}), "
        f"{tuning.train_steps} steps, {tuning.train_seconds:.0f} s of training"
    )
    if tuning.n_widenings:
        text += f"; {tuning.n_widenings} of them were added, as the best was at the edge of those tried"
    if tuning.edge:
        text += f"; the best is the {tuning.edge} of them, and a better one may lie beyond: set --tune_factors"
    return text


def _rows(runs: Sequence[Run], tasks: Sequence[TaskSummary]) -> list[Row]:
    """In the order of the runs, the references of all tasks first."""
    bases = {run.measured_on: run.report for run in runs if run.is_base}
    groups = rows_of(runs)
    firsts = [group[0] for group in groups]
    rows = [
        _row(name, sorted(group, key=lambda run: run.report.seed), bases.get(group[0].measured_on))
        for name, group in zip(names_of(firsts), groups, strict=True)
    ]
    rows = with_teacher_shares(rows, firsts, tasks)
    references = [row for row in rows if row.is_reference]
    return [*references, *_majority_rows(runs), *(row for row in rows if not row.is_reference)]


def _majority_rows(runs: Sequence[Run]) -> Iterator[Row]:
    """A row for each classification: what always answering with the most frequent label scores."""
    shares = {run.task: run.report.majority_share for run in runs}
    for task, share in shares.items():
        if share is not None:
            yield Row(
                id=f"{task}/{MAJORITY}",
                task=task,
                method=MAJORITY,
                family=BASE,
                seeds=(),
                values={column.key: None for column in COLUMNS},
                metrics={"accuracy": Score(None, share, None, None, None)},
                curves=(),
                samples=(),
                predictions=(),
                notes="Always answers with the most frequent label of the test split, whatever the text.",
            )


def _row(name: str, group: Sequence[Run], base: TrainingReport | None) -> Row:
    """The row of runs that differ in the seed."""
    task, is_base = group[0].task, group[0].is_base
    reports = [run.report for run in group]
    first = reports[0]
    record = None if is_base else METHODS.find(first.method)
    values: dict[str, Value] = {"model": group[0].conditions["base_model"], "host": _hosts(reports) or None}
    of_one_machine = [report for report in reports if report.machine == first.machine]
    values |= _base_values(base) | _measured(of_one_machine)
    values |= {} if is_base else _trained_values(reports) | _speed(of_one_machine)
    return Row(
        id=f"{task}/{name}",
        task=task,
        method=name,
        family=BASE if is_base else (record.family if record else "selective"),
        seeds=tuple(report.seed for report in reports),
        values={column.key: values.get(column.key) for column in COLUMNS},
        metrics=scores_over_seeds(reports, scores_of(base)),
        curves=() if is_base else tuple(report.loss_history for report in reports),
        samples=_samples(first, base),
        predictions=tuple(run.predictions for run in group) if all(run.predictions for run in group) else (),
        notes=" ".join(_notes(reports, is_base)),
    )


def _notes(reports: Sequence[TrainingReport], is_base: bool) -> Iterator[str]:
    report = reports[0]
    machines = dict.fromkeys(report.machine for report in reports)
    if len(machines) > 1:
        shown = "; ".join(_seeds_on(machine, reports) for machine in machines)
        yield f"Speed, memory and run time are of the first of these machines: {shown}."
    if report.tuning and not is_base:
        yield tuning_text(report.tuning)
    if report.general_loss_reason:
        yield f"No general loss: {report.general_loss_reason}"


def _hosts(reports: Sequence[TrainingReport]) -> str:
    return ", ".join(dict.fromkeys(report.host for report in reports if report.host))


def _seeds_on(machine: str, reports: Sequence[TrainingReport]) -> str:
    its = [report for report in reports if report.machine == machine]
    host = f"{_hosts(its)}, " if _hosts(its) else ""
    return f"{host}{machine} (seeds {', '.join(str(report.seed) for report in its)})"


def _base_values(base: TrainingReport | None) -> dict[str, Value]:
    """Figures of the untrained model. A row of that model itself shows them as before and after."""
    loss, general_loss = (scores_of(base).get("loss"), base.general_loss) if base else (None, None)
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
        "base_parameters": reports[0].base_parameters,
        "model_size_bytes": reports[0].model_size_bytes,
        "peak_memory_generation_bytes": _mean(
            _above_start(report, report.peak_memory_bytes.eval) for report in reports
        ),
        "generation_samples_per_second": _mean(report.generation_samples_per_second for report in reports),
        "run_seconds": _mean(report.run_seconds for report in reports),
    }


def _trained_values(reports: Sequence[TrainingReport]) -> dict[str, Value]:
    """Figures that only training gives."""
    first = reports[0]
    return {
        "batch_size": first.train_batch_size,
        "train_steps": first.train_steps,
        "trainable_parameters": first.trainable_parameters,
        "trainable_percent": first.trainable_percent,
        "adapter_size_bytes": _mean(report.adapter_size_bytes for report in reports),
        "test_loss_after": _mean(scores_of(report).get("loss") for report in reports),
        "general_loss_after": _mean(report.general_loss for report in reports),
        "learning_rate": first.learning_rate,
        "learning_rate_source": first.learning_rate_source,
    }


def _speed(reports: Sequence[TrainingReport]) -> dict[str, Value]:
    """What training costs on one machine."""
    peaks = (_above_start(report, report.peak_memory_bytes.train) for report in reports)
    return {
        "peak_memory_train_bytes": _mean(peaks),
        "train_steps_per_second": _mean(report.train_steps_per_second for report in reports),
        "target_tokens_per_second": _mean(report.train_target_tokens_per_second for report in reports),
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


def _total_seconds(results: Sequence[Result]) -> float | None:
    known = [result.report.run_seconds for result in results if result.report and result.report.run_seconds is not None]
    return sum(known) if known else None


def _failure(result: Result) -> Failure:
    cell = result.cell
    return Failure(cell.task, cell.label, cell.seed, result.failure or "no reason known")


def _environments(reports: Sequence[TrainingReport]) -> Iterator[str]:
    """Machines with versions; where there are several hosts, with their names."""
    several = len({report.host for report in reports}) > 1
    for shown in dict.fromkeys(map(_environment, reports)):
        hosts = _hosts([report for report in reports if _environment(report) == shown])
        yield f"{hosts}: {shown}" if several and hosts else shown


def _environment(report: TrainingReport) -> str:
    packages = ", ".join(f"{name} {report.versions.get(name)}" for name in SHOWN_PACKAGES)
    return f"{report.machine}; Python {report.versions.get('python')}, {packages}"


def _count(items: Sequence[Any], noun: str) -> str:
    return f"{len(items)} {noun}" if len(items) == 1 else f"{len(items)} {noun}s"
