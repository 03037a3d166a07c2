"""What tables, plots and page of a comparison show, as records: one row for each method on each task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from left_trainer.comparison.cell import BASE
from left_trainer.runs.json_records import to_json
from left_trainer.runs.report import Sample

Format = Literal["integer", "bytes", "percent", "share", "rate", "loss", "seconds", "learning_rate", "text"]
Value = float | str | None
FAMILIES = {
    "soft_prompt": "soft prompts",
    "additive": "additive",
    "reparameterization": "reparameterization",
    "selective": "selective",
    BASE: "untrained base",
}
MAJORITY = "majority label"  # a row beside that of the untrained model


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
    Column("host", "Host", "text", None, "Machines that ran it."),
    Column("model", "Model", "text", None, "Model that the setting starts from."),
    Column("batch_size", "Batch size", "integer", None, "Rows of one optimizer step."),
    Column("train_steps", "Steps", "integer", None, "Optimizer steps."),
    Column("total_parameters", "Parameters", "integer", None, "All parameters, the method's own included."),
    Column(
        "base_parameters",
        "Parameters without embeddings",
        "integer",
        "lower",
        "Parameters of the model apart from embeddings, head and what the method added.",
    ),
    Column("model_size_bytes", "Model size", "bytes", "lower", "Weights of the whole model, on disk."),
    Column(
        "teacher_share",
        "Share of the teacher",
        "share",
        "higher",
        "Score as percent of the teacher's; of metrics of which less is better, the other way round.",
    ),
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
    Column(
        "test_loss_after",
        "Test loss after",
        "loss",
        "lower",
        "Nats per target token of the test split; of the base, untrained.",
    ),
    Column("general_loss_before", "General loss before", "loss", None, "Nats per token of general text, untrained."),
    Column(
        "general_loss_after",
        "General loss after",
        "loss",
        "lower",
        "Nats per token of general text: above the base's, it was forgotten.",
    ),
    Column("run_seconds", "Run time", "seconds", "lower", "The whole run: loading, training, generating, scoring."),
    Column("learning_rate", "Learning rate", "learning_rate", None, "Peak learning rate."),
    Column("learning_rate_source", "Rate from", "text", None, "Where the learning rate comes from."),
)
# Columns that are shown only where rows differ in them.
WHERE_ROWS_DIFFER = ("host", "model", "base_parameters", "model_size_bytes", "teacher_share")


@dataclass(frozen=True)
class Score:
    """A metric of the task over seeds.

    Args:
        before: Of the untrained model; `None` where it was not scored.
        mean: Over seeds; of the untrained model its own score.
        low: End of the 95 % interval; `None` where there is none.
        high: The other end.
        interval: What the interval is over: seeds (Student's t), or, with one seed, rows of the test split (percentile
            bootstrap), which only the main metric has.
    """

    before: float | None
    mean: float | None
    low: float | None
    high: float | None
    interval: Literal["seeds", "rows"] | None


@dataclass(frozen=True)
class Row:
    """A method on a task.

    Args:
        id: That no other row has.
        task: Name of the task.
        method: Name of the setting or of its method, with what sets it apart from other rows of the same name.
        family: Of the method, a key of `FAMILIES`.
        seeds: Of the runs that the row sums up.
        values: Figures by the key of their column.
        metrics: Scores by name.
        curves: For each seed, pairs of an optimizer step and the training loss.
        samples: Rows of the test split with the texts before and after training.
        predictions: For each seed, where the predictions of the test split are, below the comparison's folder; empty
            where they are not there.
        notes: What else there is to say; usually empty.
    """

    id: str
    task: str
    method: str
    family: str
    seeds: tuple[int, ...]
    values: Mapping[str, Value]
    metrics: Mapping[str, Score]
    curves: tuple[tuple[tuple[int, float | None], ...], ...]
    samples: tuple[Sample, ...]
    predictions: tuple[str, ...]
    notes: str

    @property
    def is_reference(self) -> bool:
        """Whether the row is of no method: the untrained model, or a baseline."""
        return self.family == BASE

    @property
    def is_untrained(self) -> bool:
        """Whether the row is of an untrained model: there is one for each model."""
        return self.is_reference and self.method != MAJORITY


@dataclass(frozen=True)
class TaskSummary:
    """A task and how it was judged.

    Args:
        name: Of the task.
        summary: What it is.
        main_metric: That methods are compared by.
        metrics: All of them, that one first.
        lower_is_better: Those of which less is better.
        settings: What the scores depend on, for people: rows, prompt, beams, lengths.
    """

    name: str
    summary: str
    main_metric: str
    metrics: tuple[str, ...]
    lower_is_better: tuple[str, ...]
    settings: Mapping[str, str]

    def quality(self, row: Row) -> float:
        """The main metric of a row with the sign that makes more better; less than any number where it has none."""
        score = row.metrics.get(self.main_metric)
        if score is None or score.mean is None or not math.isfinite(score.mean):
            return -math.inf
        return -score.mean if self.main_metric in self.lower_is_better else score.mean


@dataclass(frozen=True)
class Failure:
    """A run that failed, and why."""

    task: str
    method: str
    seed: int
    reason: str


@dataclass(frozen=True)
class Summary:
    """A whole comparison.

    Args:
        title: Of tables and page.
        model: Name of the model.
        machines: What it was measured on, with versions.
        command: That made it.
        run_seconds: Of all runs together, trials included; `None` where it is not known.
        seeds: Of all runs.
        families: Names of the families for people.
        tasks: In the order in which they are shown.
        columns: Figures that each row has.
        methods: References first, then methods by their mean place over the tasks, the best first, failed ones too.
        rows: By task, references first, then methods by quality, the best first.
        failures: Runs that failed.
    """

    title: str
    model: str
    machines: tuple[str, ...]
    command: str
    run_seconds: float | None
    seeds: tuple[int, ...]
    families: Mapping[str, str]
    tasks: tuple[TaskSummary, ...]
    columns: tuple[Column, ...]
    methods: tuple[str, ...]
    rows: tuple[Row, ...]
    failures: tuple[Failure, ...]

    def rows_of(self, task: TaskSummary) -> tuple[Row, ...]:
        """The rows of one task."""
        return tuple(row for row in self.rows if row.task == task.name)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, which the page reads. Numbers that are not finite become null."""
        return dict(to_json(self))
