"""What a run leaves in its folder: the report, the loss curve and the model card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from left_trainer.callbacks.trainable_parameters import count_parameters
from left_trainer.evaluation import baselines
from left_trainer.evaluation.scores import is_quality, without_prefix
from left_trainer.evaluation.text_metrics import decode
from left_trainer.methods.options import plain_options
from left_trainer.models import unwrapped
from left_trainer.runs.measurements import base_size, machine_name, saved_bytes, target_tokens_per_row
from left_trainer.runs.report import (
    FastPathUse,
    Metrics,
    ModelSize,
    PeakMemory,
    Sample,
    Scores,
    ShrinkReport,
    TeacherReport,
    TrainingReport,
)
from left_trainer.runs.report_text import draw_losses, results_section
from left_trainer.tasks import Task
from left_trainer.trainer import LeftTrainer
from left_trainer.trainer.figures import ProcessFigures
from left_trainer.trainer.model_card import CardNotes, package_versions
from left_trainer.training_args import LeftTrainingArguments

Figures: TypeAlias = Sequence[ProcessFigures]
Number = TypeVar("Number", int, float)


def collect_samples(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    predictions: Mapping[str, np.ndarray | None],
    number: int,
) -> tuple[Sample, ...]:
    """The first `number` rows with what the model wrote; none where it wrote nothing.

    Args:
        rows: With the columns `source` and `target`.
        tokenizer: Decodes the predictions.
        predictions: Token ids `(rows, sequence)`, by the field of `Sample` that takes their text: `before`, `after` or
            `prediction`; `None` where nothing was generated.
        number: How many.
    """
    written = {name: token_ids for name, token_ids in predictions.items() if token_ids is not None}
    first = rows.select(range(min(number, len(rows)) if written else 0))
    texts = {name: decode(tokenizer, token_ids[: len(first)]) for name, token_ids in written.items()}
    return tuple(
        Sample(row["source"], row["target"], **{name: texts[name][index] for name in texts})
        for index, row in enumerate(first)
    )


def build_report(
    trainer: LeftTrainer,
    task: Task,
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
    prompt: str | None = None,
    samples: Sequence[Sample] = (),
    majority: float | None = None,
    teacher: Scores | None = None,
) -> TrainingReport:
    """The report of a finished run.

    Args:
        trainer: After `train()` and `save_model()`.
        task: What it was trained for.
        before: Metrics of the untrained model, with any prefix; `None` where it was not scored.
        after: Those of the trained model; the same.
        prompt: Template used instead of the task's.
        samples: As `collect_samples` returns them.
        majority: As `majority_share` returns it.
        teacher: Scores of the teacher, with any prefix; `None` where it was not scored.
    """
    args, state, count = trainer.args, trainer.state, count_parameters(unwrapped(trainer.model))
    batch_size, speed = _rows_per_step(args), _steps_per_second(trainer.figures)
    base_parameters, model_size_bytes = base_size(unwrapped(trainer.model))
    return TrainingReport(
        method=trainer.method.name if trainer.method else count.method,
        peft_kwargs=plain_options(args.peft_options),
        task=task.name,
        prompt=prompt or task.prompt,
        base_model=trainer.base_model_name,
        trainable_parameters=count.trainable,
        total_parameters=count.total,
        trainable_percent=count.percent,
        matched_modules=tuple(count.matched_modules),
        metrics=Metrics(_scores(before), _scores(after)),
        learning_rate=args.learning_rate,
        learning_rate_source=trainer.learning_rate_source,
        train_steps=state.global_step,
        train_batch_size=batch_size,
        train_steps_per_second=speed,
        train_samples_per_second=_times(speed, batch_size),
        train_target_tokens_per_second=_times(speed, batch_size, target_tokens_per_row(trainer.train_dataset)),
        generation_samples_per_second=_generated_per_second(trainer.figures),
        peak_memory_bytes=_peak_memory(trainer.figures),
        fast_paths={name: FastPathUse(path.ran, dict(path.fell_back)) for name, path in trainer.fast_paths.items()},
        adapter_size_bytes=saved_bytes(Path(args.output_dir)),
        loss_history=tuple((entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry),
        samples=tuple(samples),
        seed=args.seed,
        versions=package_versions(),
        device=str(args.device),
        machine=machine_name(),
        processes=args.world_size,
        cut_rows=dict(trainer.cut_rows),
        majority_share=majority,
        planned=trainer.planned,
        shrinking=_shrinking(trainer),
        base_parameters=base_parameters,
        model_size_bytes=model_size_bytes,
        teacher=_teacher(trainer, _scores(teacher), _scores(after)),
    )


def _teacher(trainer: LeftTrainer, teachers: Scores | None, students: Scores | None) -> TeacherReport | None:
    if trainer.teaching is None:
        return None
    title, options = trainer.teaching.teacher.title, trainer.teaching.identity
    shares = {
        name: students[name] / score  # type: ignore[operator]
        for name, score in (teachers or {}).items()
        if students and is_quality(name) and score and students.get(name) is not None
    }
    return TeacherReport(title, options, teachers, shares)


def _shrinking(trainer: LeftTrainer) -> ShrinkReport | None:
    if trainer.shrinking is None:
        return None
    sizes = tuple(
        ModelSize(each.step, each.parameters, each.share, **vars(each.size)) for each in trainer.shrinking.state.history
    )
    return ShrinkReport(trainer.shrinking.parameters_before, sizes[-1].parameters, sizes)


def majority_share(task: Task, targets: Sequence[str]) -> float | None:
    """Percent of `targets` that are the most frequent label; `None` for a task whose targets are no labels."""
    return baselines.majority_share(targets) if "accuracy" in task.metrics else None


def write_report(trainer: LeftTrainer, report: TrainingReport) -> Path:
    """Write `loss.png`, the model card and, last, `training_report.json` into the run's folder.

    A folder with a report is that of a finished run: the file appears whole or not at all.
    """
    folder = Path(trainer.args.output_dir)
    if any("loss" in entry or "eval_loss" in entry for entry in trainer.state.log_history):
        draw_losses(trainer.state.log_history, folder / "loss.png", report.method)
    trainer.card_notes = CardNotes((report.task,), results_section(report))
    trainer.create_model_card()
    return report.write(folder)


def _rows_per_step(args: LeftTrainingArguments) -> int:
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


def _steps_per_second(figures: Figures) -> float | None:
    """Of the slowest process, for which the others wait."""
    seconds = _most(each.seconds_per_step for each in figures)
    return 1 / seconds if seconds else None


def _generated_per_second(figures: Figures) -> float | None:
    """Of all processes, each of which generates for rows of its own."""
    rates = [each.generated_rows_per_second for each in figures]
    known = [rate for rate in rates if rate is not None]
    return math.fsum(known) if known else None


def _peak_memory(figures: Figures) -> PeakMemory:
    trained = [each.train_peak_bytes for each in figures]
    known = [peak for peak in trained if peak is not None]
    return PeakMemory(
        _most(trained),
        _most(each.eval_peak_bytes for each in figures),
        _most(each.step_peak_bytes for each in figures),
        train_of_all=sum(known) if len(known) == len(trained) > 1 else None,
    )


def _most(values: Iterable[Number | None]) -> Number | None:
    return max((value for value in values if value is not None), default=None)


def _scores(metrics: Scores | None) -> Scores | None:
    return None if metrics is None else without_prefix(metrics)


def _times(*factors: float | None) -> float | None:
    """The product; `None` where a factor is not known."""
    known = [factor for factor in factors if factor is not None]
    return math.prod(known) if len(known) == len(factors) else None
