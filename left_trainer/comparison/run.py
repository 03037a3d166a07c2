"""The runs behind a table: which of them are one row, and what sets rows of one name apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from left_trainer.comparison.cell import BASE, COMPRESSION_FIELDS
from left_trainer.comparison.results import Result
from left_trainer.runs.report import TrainingReport


@dataclass(frozen=True)
class Run:
    """A run that ended well.

    Args:
        task: Name of the task.
        is_base: Whether the model was scored as it is.
        conditions: What it was measured on.
        report: What it gave.
        arguments: Those of the run, of which some set it apart from others.
        predictions: Where its predictions are, below the comparison's folder; empty where they are not there.
        setting: Its name, where the user gave it one.
        teachers: Settings whose results it refers to.
    """

    task: str
    is_base: bool
    conditions: Mapping[str, Any]
    report: TrainingReport
    arguments: Mapping[str, Any] = field(default_factory=dict)
    predictions: str = ""
    setting: str | None = None
    teachers: tuple[str, ...] = ()

    @classmethod
    def of(cls, result: Result, report: TrainingReport, predictions: str) -> Run:
        """The run of a result that has a report."""
        cell = result.cell
        return cls(
            task=cell.task,
            is_base=cell.kind == BASE,
            conditions=cell.conditions,
            report=report,
            arguments=cell.arguments,
            predictions=predictions,
            setting=cell.setting,
            teachers=tuple(cell.after or ()),
        )

    @property
    def label(self) -> str:
        """What the row is called, unless another is called so too."""
        return self.setting or self.report.method

    @property
    def measured_on(self) -> tuple[str, str]:
        """What has to be equal for a run to be compared with the untrained model's scores."""
        return self.task, json.dumps(self.conditions, sort_keys=True)

    @property
    def place(self) -> dict[str, Any]:
        """Where it ran."""
        return {"machine": self.report.machine, "host": self.report.host}

    @property
    def group(self) -> tuple[Any, ...]:
        """Equal for runs that differ in nothing but the seed and the place."""
        set_apart = () if self.is_base else (self.label, *map(str, self.differs_by.values()))
        return (*self.measured_on, self.is_base, *set_apart)

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
            "model": self.conditions["base_model"],
            **{name: self.arguments.get(name) for name in COMPRESSION_FIELDS},
        }


def rows_of(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs of each row: those that differ in the seed alone, wherever they ran.

    A seed that ran in several places is there to compare these: each of them has a row.
    """
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    rows: dict[tuple[Any, ...], list[Run]] = {}
    for group, members in groups.items():
        is_repeated = len({run.report.seed for run in members}) < len(members) and not members[0].is_base
        for run in members:
            rows.setdefault((group, *(run.place.values() if is_repeated else ())), []).append(run)
    return list(rows.values())


def names_of(runs: Sequence[Run]) -> list[str]:
    """The label of each run, with what sets it apart from the others of the same label on the same task."""
    names = []
    for run in runs:
        same = [other for other in runs if (other.task, other.label) == (run.task, run.label)]
        alike = [other for other in same if other.group == run.group]  # but for the place
        parts = [
            *_differing(run.differs_by, [other.differs_by for other in same]),
            *_differing(run.place, [other.place for other in alike]),
        ]
        names.append(f"{run.label} ({', '.join(parts)})" if parts else run.label)
    return names


def _differing(own: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    return [_shown(name, value) for name, value in own.items() if any(other[name] != value for other in others)]


def _shown(name: str, value: Any) -> str:
    if name == "options":
        return str(value).strip("{}").replace('"', "") or "defaults"
    if name in COMPRESSION_FIELDS and value is None:
        return f"no {name}"
    return f"{name} {value}"
