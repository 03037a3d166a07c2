"""The report of a run: one typed record that is written and read back by the same class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from left_trainer.data.cut_rows import CutRows
from left_trainer.evaluation.intervals import Interval
from left_trainer.planning.planned_run import PlannedRun
from left_trainer.runs.files_of_0_1 import upgrade_learning_rate_source
from left_trainer.runs.json_records import from_json, read_json, to_json, write_json
from left_trainer.runs.tuning import TuningResult

REPORT_FILE = "training_report.json"
# Set by the user; the method's default; that times the factor of the model; the best of several trials.
ReportedRateSource = Literal["given", "default", "tuned"]
Scores = Mapping[str, float | None]


@dataclass(frozen=True)
class Metrics:
    """Scores on the test split by name, without a prefix; `None` for a model that was not scored."""

    before: Scores | None
    after: Scores | None


@dataclass(frozen=True)
class PeakMemory:
    """Most bytes in use, of several processes in the one that used most; `None` where it was not measured.

    Args:
        train: In training.
        eval: In evaluation.
        step: In training, less what was in use before it beside the weights: on a CPU, interpreter and libraries.
        train_of_all: In training, the sum over all of several processes.
    """

    train: int | None
    eval: int | None
    step: int | None = None
    train_of_all: int | None = None


@dataclass(frozen=True)
class FastPathUse:
    """Number of calls that took a fast path, and of those that did not, by reason."""

    ran: int
    fell_back: Mapping[str, int]


@dataclass(frozen=True)
class Sample:
    """A row with what the model wrote: `before` and `after` training, or one `prediction`."""

    source: str
    reference: str
    before: str | None = None
    after: str | None = None
    prediction: str | None = None


@dataclass(frozen=True)
class TeacherReport:
    """The teacher that a model has learned from.

    Args:
        name: Hub name or path, `base` or `self`.
        options: How it was learned from.
        metrics: Its own scores on the test split; `None` where it was not scored.
        share_kept: Scores of the trained model in parts of the teacher's, by metric.
    """

    name: str
    options: Mapping[str, Any]
    metrics: Scores | None
    share_kept: Scores = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSize:
    """A size that a model has had.

    Args:
        step: Optimizer steps before it had it.
        parameters: Apart from embeddings, output head and adapter.
        share: Of the parameters that the model began with.
        layers: Number of blocks, by stack.
        ffn: Width of the feed-forward modules, by stack.
        heads: Key and value heads of each attention; `None` where their number is tied to the width of the model.
    """

    step: int
    parameters: int
    share: float
    layers: Mapping[str, int]
    ffn: Mapping[str, int]
    heads: int | None


@dataclass(frozen=True)
class ShrinkReport:
    """How the model has shrunk. Parameters are counted apart from embeddings, output head and adapter.

    Args:
        parameters_before: Of the model that the run began with.
        parameters_after: Of the model that it has left.
        sizes: The sizes that it has had, from the first.
    """

    parameters_before: int
    parameters_after: int
    sizes: tuple[ModelSize, ...]


@dataclass(frozen=True)
class TrainingReport:
    """Everything there is to say about a finished run; `training_report.json` holds it.

    Units are in the names; `None` stands for a figure that was not measured, and for one that is not finite.

    Args:
        method: What was trained; `base` where a comparison scored the model as it is.
        prompt: Template of the prompts.
        matched_modules: Modules that the method changed.
        learning_rate_source: Where the learning rate comes from.
        train_batch_size: Rows of one optimizer step, of all processes.
        train_samples_per_second: Rows of all processes; so are target tokens and generated rows.
        adapter_size_bytes: What was saved, on disk.
        loss_history: Pairs of an optimizer step and the training loss.
        machine: Processor, cores and GPU; of several machines the first one's.
        processes: That trained together.
        tuning: The trials, where the source is `tuned`.
        memory_before_model_bytes: Measured in a comparison: in use before the model was loaded.
        diverged_at_step: The step whose loss or gradients were not finite, where a run ended so.
        general_loss: Measured in a comparison: loss on general text after the run, in nats per token.
        general_loss_reason: Why a comparison has no general loss.
        test_rows: Rows that a comparison scored.
        score_interval: Computed in a comparison: 95 % interval of the task's main metric over these rows.
        planned: What the run was planned to need before it began; its `peak_bytes` stand beside
            `peak_memory_bytes.step`.
        run_seconds: Measured in a comparison: the whole run, from its arguments to its last score.
        cut_rows: How many rows of `train`, `eval` and `test` were too long; a split that is streamed is not counted.
        majority_share: Percent of test rows that have the most frequent label, which is the accuracy of always
            answering with it; for tasks that are scored by accuracy.
        teacher: What it has learned from, where there was a teacher.
        setting: Name of the setting of a comparison, where the user gave it one.
        host: Name of the machine that ran it for a comparison.
        base_parameters: Of the model without what the method added, apart from embeddings and head.
        model_size_bytes: Of the weights of the same model, embeddings and head included, as they are saved.
        data: The data arguments that were not left at their defaults, from which the rows are found again.
    """

    method: str
    peft_kwargs: Mapping[str, Any]
    task: str
    prompt: str
    base_model: str
    trainable_parameters: int | None
    total_parameters: int
    trainable_percent: float | None
    matched_modules: tuple[str, ...]
    metrics: Metrics
    learning_rate: float | None
    learning_rate_source: ReportedRateSource
    train_steps: int
    train_batch_size: int
    train_steps_per_second: float | None
    train_samples_per_second: float | None
    train_target_tokens_per_second: float | None
    generation_samples_per_second: float | None
    peak_memory_bytes: PeakMemory
    fast_paths: Mapping[str, FastPathUse]
    adapter_size_bytes: int
    loss_history: tuple[tuple[int, float | None], ...]
    samples: tuple[Sample, ...]
    seed: int
    versions: Mapping[str, str | None]
    device: str
    machine: str
    tuning: TuningResult | None = None
    memory_before_model_bytes: int | None = None
    general_loss: float | None = None
    diverged_at_step: int | None = None
    general_loss_reason: str | None = None
    test_rows: int | None = None
    score_interval: Interval | None = None
    cut_rows: Mapping[str, CutRows] = field(default_factory=dict)
    majority_share: float | None = None
    run_seconds: float | None = None
    planned: PlannedRun | None = None
    shrinking: ShrinkReport | None = None
    teacher: TeacherReport | None = None
    setting: str | None = None
    host: str | None = None
    base_parameters: int | None = None
    model_size_bytes: int | None = None
    processes: int = 1
    data: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(to_json(self))

    @classmethod
    def from_json(cls, content: Any) -> TrainingReport:
        """From JSON values, those of version 0.1 included; keys that a later version added are ignored.

        Raises:
            ValueError: A field is missing or has another type; the message names it.
        """
        return from_json(cls, upgrade_learning_rate_source(content) if isinstance(content, Mapping) else content)

    def write(self, folder: str | Path) -> Path:
        """Write `training_report.json` into `folder`, whole."""
        path = Path(folder) / REPORT_FILE
        write_json(path, self)
        return path

    @classmethod
    def read(cls, folder: str | Path) -> TrainingReport:
        """The report in `folder`.

        Raises:
            FileNotFoundError: There is none.
            ValueError: The file is not a report; the message names the file and the field.
        """
        path = Path(folder) / REPORT_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} has no {REPORT_FILE}. Pass the output_dir of a finished training."
            )
        try:
            return cls.from_json(read_json(path))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is not a training report: {error}") from error
