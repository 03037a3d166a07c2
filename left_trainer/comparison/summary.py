"""From results to what the tables, the plots and the page show: one row for each method on each task."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from left_trainer.comparison.results import Result
from left_trainer.evaluation.scores import is_quality
from left_trainer.methods.registry import METHODS
from left_trainer.runs.report import finite
from left_trainer.tasks.registry import TASKS

Format = Literal["integer", "bytes", "percent", "rate", "loss", "learning_rate", "text"]
BASE = "base"
FAMILIES = {
    "soft_prompt": "soft prompts",
    "additive": "additive",
    "reparameterization": "reparameterization",
    "selective": "selective",
    BASE: "untrained base",
}
# 97.5 percent quantiles of Student's t distribution by degrees of freedom; the normal distribution's beyond.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


@dataclass(frozen=True)
class Column:
    """A figure of a run.

    Args:
        key: In a row's `values`.
        title: For people.
        format: How a value is written.
        better: Which way is up; `None` where neither is.
        help: One sentence.
    """

    key: str
    title: str
    format: Format
    better: Literal["lower", "higher"] | None
    help: str


COLUMNS = (
    Column("batch_size", "Batch size", "integer", None, "Rows of one optimizer step."),
    Column("train_steps", "Steps", "integer", None, "Optimizer steps."),
    Column("total_parameters", "Parameters", "integer", None, "All parameters, the method's own included."),
    Column("trainable_parameters", "Trainable", "integer", "lower", "Parameters that receive gradients."),
    Column("trainable_percent", "Trainable %", "percent", "lower", "The same as percent of all."),
    Column("adapter_size_bytes", "Adapter size", "bytes", "lower", "What was saved, on disk."),
    Column(
        "peak_memory_train_bytes",
        "Memory, training",
        "bytes",
        "lower",
        "Most in use during training, weights included, above what the process had before the model was loaded.",
    ),
    Column(
        "peak_memory_generation_bytes",
        "Memory, generation",
        "bytes",
        "lower",
        "The same during generation, after gradients and optimizer were let go.",
    ),
    Column("train_steps_per_second", "Steps/s", "rate", "higher", "Optimizer steps alone, without the first two."),
    Column("target_tokens_per_second", "Target tokens/s", "rate", "higher", "Tokens of targets trained on, likewise."),
    Column(
        "generation_samples_per_second",
        "Generated rows/s",
        "rate",
        "higher",
        "Rows generated, without the first batch where there are others; no metrics, no loss.",
    ),
    Column("test_loss_before", "Test loss before", "loss", None, "Nats per target token of the test split, untrained."),
    Column("test_loss_after", "Test loss after", "loss", "lower", "The same after training."),
    Column("general_loss_before", "General loss before", "loss", None, "Nats per token of general text, untrained."),
    Column("general_loss_after", "General loss after", "loss", "lower", "The same after training: what was forgotten."),
    Column("learning_rate", "Learning rate", "learning_rate", None, "Peak learning rate."),
    Column("learning_rate_source", "Rate from", "text", None, "Where the learning rate comes from."),
)


def summarize(results: Sequence[Result], title: str = "", command: str = "") -> dict[str, Any]:
    """Everything that is shown, as plain JSON values without NaN; the keys are those of `page.write_page`.

    Args:
        results: Of comparable runs; trials of learning rates are left out.
        title: Of the page; by default made from what there is.
        command: That made the results.
    """
    shown = [result for result in results if result.cell.kind != "trial"]
    finished = [result for result in shown if result.report is not None]
    bases = {_base_key(result): result.report for result in finished if result.cell.kind == "base"}
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in finished:
        groups.setdefault(_group_key(result), []).append(result)
    rows = [_row(key, group, bases.get(_base_key(group[0]))) for key, group in groups.items()]
    _label(rows)
    tasks = list(dict.fromkeys(result.cell.task for result in shown))
    order = {name: position for position, name in enumerate(tasks)}
    rows.sort(key=lambda row: (order[row["task"]], row["family"] != BASE))
    models = list(dict.fromkeys(result.cell.conditions["base_model"] for result in shown))
    methods = list(dict.fromkeys(result.cell.method for result in shown if result.cell.kind != BASE))
    summary = {
        "title": title or f"{_count(methods, 'method')} on {_count(tasks, 'task')}",
        "model": ", ".join(models),
        "machines": list(dict.fromkeys(_environment(result.report) for result in finished if result.report)),
        "command": command,
        "seeds": sorted({result.cell.seed for result in shown}),
        "families": FAMILIES,
        "tasks": [_task(name, [row for row in rows if row["task"] == name]) for name in tasks],
        "columns": [vars(column) for column in COLUMNS],
        "rows": rows,
        "failures": [
            {
                "task": result.cell.task,
                "method": BASE if result.cell.kind == BASE else result.cell.method,
                "seed": result.cell.seed,
                "reason": result.failure,
            }
            for result in shown
            if result.report is None
        ],
    }
    return finite(summary)


def _count(items: Sequence[Any], noun: str) -> str:
    return f"{len(items)} {noun}" if len(items) == 1 else f"{len(items)} {noun}s"


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


def _group_key(result: Result) -> tuple[Any, ...]:
    """Runs that differ in nothing but the seed."""
    report = result.report or {}
    if result.cell.kind == BASE:
        return (*_base_key(result), BASE)
    return (
        *_base_key(result),
        report["method"],
        json.dumps(report["peft_kwargs"], sort_keys=True),
        report["train_batch_size"],
        report["train_steps"],
        report["learning_rate"],
        report["machine"],
    )


def _base_key(result: Result) -> tuple[Any, ...]:
    return (result.cell.task, json.dumps(result.cell.conditions, sort_keys=True))


def _row(key: tuple[Any, ...], group: Sequence[Result], base: Mapping[str, Any] | None) -> dict[str, Any]:
    reports = [result.report for result in group if result.report is not None]
    first, is_base = reports[0], group[0].cell.kind == BASE
    method = None if is_base else METHODS.find(first["method"])
    base_scores = base["metrics"]["before"] if base else {}
    scores = [report["metrics"]["before" if is_base else "after"] for report in reports]
    return {
        "task": group[0].cell.task,
        "method": BASE if is_base else first["method"],
        "family": BASE if is_base else (method.family if method else "selective"),
        "seeds": sorted(report["seed"] for report in reports),
        "values": _values(reports, base, is_base),
        "metrics": {
            name: dict(
                zip(
                    ("before", "mean", "low", "high"),
                    (base_scores.get(name), *interval([score[name] for score in scores if score[name] is not None])),
                    strict=True,
                )
            )
            for name in scores[0]
            if is_quality(name)
        },
        "curves": [] if is_base else [report["loss_history"] for report in reports],
        "samples": _samples(first, base),
        "notes": ""
        if is_base or not first["learning_rate_source"].startswith("tuned")
        else first["learning_rate_source"],
        "differs_by": {
            "options": json.dumps(first["peft_kwargs"] or {}),
            "batch size": first["train_batch_size"],
            "steps": first["train_steps"],
            "learning rate": first["learning_rate"],
            "machine": first["machine"],
            "model": group[0].cell.conditions["base_model"],
        },
    }


def _values(
    reports: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None, is_base: bool
) -> dict[str, float | str | None]:
    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    def above_start(report: Mapping[str, Any], phase: str) -> float | None:
        peak, on_cpu = report["peak_memory_bytes"][phase], report["device"] == "cpu"
        return None if peak is None else peak - (report["memory_before_model_bytes"] if on_cpu else 0)

    values: dict[str, float | str | None] = {
        "total_parameters": reports[0]["total_parameters"],
        "peak_memory_generation_bytes": mean([above_start(report, "eval") for report in reports]),
        "generation_samples_per_second": mean([report["generation_samples_per_second"] for report in reports]),
        "test_loss_before": base["metrics"]["before"]["loss"] if base else None,
        "general_loss_before": base["general_loss"] if base else None,
    }
    if is_base:
        values |= {"test_loss_after": values["test_loss_before"], "general_loss_after": values["general_loss_before"]}
        return {column.key: values.get(column.key) for column in COLUMNS}
    values |= {
        "batch_size": reports[0]["train_batch_size"],
        "train_steps": reports[0]["train_steps"],
        "trainable_parameters": reports[0]["trainable_parameters"],
        "trainable_percent": reports[0]["trainable_percent"],
        "adapter_size_bytes": mean([report["adapter_size_bytes"] for report in reports]),
        "peak_memory_train_bytes": mean([above_start(report, "train") for report in reports]),
        "train_steps_per_second": mean([report["train_steps_per_second"] for report in reports]),
        "target_tokens_per_second": mean([report["train_target_tokens_per_second"] for report in reports]),
        "test_loss_after": mean([report["metrics"]["after"]["loss"] for report in reports]),
        "general_loss_after": mean([report["general_loss"] for report in reports]),
        "learning_rate": reports[0]["learning_rate"],
        "learning_rate_source": reports[0]["learning_rate_source"].partition(":")[0],
    }
    return {column.key: values.get(column.key) for column in COLUMNS}


def _samples(report: Mapping[str, Any], base: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """The predictions of a run beside those of the untrained model for the same rows."""
    before = {sample["source"]: sample["prediction"] for sample in (base["samples"] if base else ())}
    return [
        {
            "source": sample["source"],
            "reference": sample["reference"],
            "before": before.get(sample["source"], ""),
            "after": sample["prediction"],
        }
        for sample in report["samples"]
    ]


def _label(rows: Sequence[dict[str, Any]]) -> None:
    """Give each row an id, and its method's name, with what sets it apart from other rows of the same method."""
    for row in rows:
        row["label"] = row["method"]
    for row in rows:
        same = [other for other in rows if (other["task"], other["method"]) == (row["task"], row["method"])]
        parts = [
            f"{name} {value}" if name != "options" else str(value).strip("{}").replace('"', "") or "defaults"
            for name, value in row["differs_by"].items()
            if any(other["differs_by"][name] != value for other in same)
        ]
        row["label"] = f"{row['method']} ({', '.join(parts)})" if parts else row["method"]
    for row in rows:
        row["method"] = row.pop("label")
        row["id"] = f"{row['task']}/{row['method']}"
        del row["differs_by"]


def _task(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    task = TASKS.find(name)
    metrics = list(dict.fromkeys(metric for row in rows for metric in row["metrics"]))
    main = task.main_metric if task else next(iter(metrics), "")
    return {
        "name": name,
        "summary": task.summary if task else "",
        "main_metric": main,
        "metrics": [main, *(metric for metric in metrics if metric != main)],
    }


def _environment(report: Mapping[str, Any]) -> str:
    versions = report["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "trl"))
    return f"{report['machine']}; Python {versions['python']}, {packages}"
