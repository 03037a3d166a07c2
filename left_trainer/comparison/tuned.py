"""Learning rates of a plan: which are tried, which is best, and the runs that have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from left_trainer.comparison.cell import Cell
from left_trainer.comparison.layout import Plan
from left_trainer.comparison.settings import references
from left_trainer.evaluation.scores import is_lower_better
from left_trainer.runs.report import TrainingReport
from left_trainer.runs.tuning import Trial, TuningResult
from left_trainer.tasks import Task, get_task

MAX_WIDENINGS = 2  # of the learning rates of one method on one task


def bound(plan: Plan, known: Mapping[tuple[str, str, int], Cell]) -> Plan | None:
    """The plan with the cells that it refers to: each run with that of its task and its own seed.

    Args:
        plan: Of a setting that may refer to others.
        known: Runs of other settings, by task, setting and seed.

    Returns:
        `None` where it is not known yet which cells these are: their learning rates are still tried.
    """

    def bind(cell: Cell) -> Cell:
        names = references(cell.arguments).values()
        return replace(cell, after={name: known[cell.task, name, cell.seed].name for name in names} or None)

    try:
        return replace(plan, trials=tuple(map(bind, plan.trials)), runs=tuple(map(bind, plan.runs)))
    except KeyError:
        return None


def tuned_runs(plan: Plan, reports: Mapping[float, TrainingReport]) -> list[Cell]:
    """The runs of a plan with the learning rate that its trials found best, the default where all trials failed.

    Args:
        plan: Its trials have been run.
        reports: Of the trials that ended well, by learning rate.
    """
    task = get_task(plan.runs[0].task)
    metric = task.main_metric
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
