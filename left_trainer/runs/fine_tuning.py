"""One run from arguments to report: what `left-trainer train` does, and what a recipe spells out."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import PredictionOutput

from left_trainer.callbacks import MemoryProfilerCallback, TrainableParametersCallback
from left_trainer.callbacks.step_timer import StepTimerCallback
from left_trainer.callbacks.trackers import log_pictures
from left_trainer.compression_options import BASE_TEACHER, SELF_TEACHER
from left_trainer.data.arguments import DataArguments, ModelArguments
from left_trainer.data.loading import prepare_task_data
from left_trainer.evaluation.text_metrics import TextMetrics, text_metrics
from left_trainer.models import load_tokenizer, model_family, without_adapter
from left_trainer.plugins import add_plugin_option
from left_trainer.runs.build_report import build_report, collect_samples, majority_share, write_report
from left_trainer.runs.report import Scores, TrainingReport
from left_trainer.runs.training_parser import TrainingParser
from left_trainer.storage.locks import folder_lock
from left_trainer.tasks import Task
from left_trainer.trainer import LeftTrainer
from left_trainer.trainer.checkpoints import check_room
from left_trainer.trainer.checks import Request, check_model_and_method
from left_trainer.trainer.divergence import TrainingDivergedError
from left_trainer.trainer.preparation import method_of
from left_trainer.trainer.teaching import answering_as_teacher
from left_trainer.training_args import LeftTrainingArguments

N_SAMPLES = 3
# What a run on a task differs in from Hugging Face's defaults; a user's flags beat them.
TASK_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 50,
    "logging_steps": 0.1,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "predict_with_generate": True,
    "report_to": "none",
    "report_plan": True,
}


@dataclass(frozen=True)
class Run:
    """A trainer that is ready, with the data it will be judged on."""

    task: Task
    trainer: LeftTrainer
    data: DatasetDict
    prompt: str | None
    data_args: DataArguments | None = None


def training_parser(**defaults: Any) -> TrainingParser:
    """A parser of `ModelArguments`, `DataArguments` and `LeftTrainingArguments`, from flags or, with `--config`, YAML.

    Args:
        defaults: What a recipe sets beside `TASK_DEFAULTS`; flags and the YAML file beat them.
    """
    parser = TrainingParser((ModelArguments, DataArguments, LeftTrainingArguments))
    add_plugin_option(parser)
    parser.set_defaults(**{**TASK_DEFAULTS, **defaults})
    return parser


def set_up(task: Task, model_args: ModelArguments, data_args: DataArguments, args: LeftTrainingArguments) -> Run:
    """Load data, tokenizer and model, and build the trainer. Raises what these raise on bad input."""
    args = with_task_settings(task, args)
    source = model_args.source(args)
    check_model_and_method(Request(source, args, method_of(source, args, None)))  # before the rows are read
    check_room(args)
    tokenizer = load_tokenizer(source)
    data = prepare_task_data(task, data_args, source, tokenizer, args)
    trainer = LeftTrainer(
        source,
        args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        compute_metrics=_metrics(task, tokenizer, args),
        callbacks=[TrainableParametersCallback(), MemoryProfilerCallback(), StepTimerCallback()],
    )
    if args.resume_from_checkpoint:  # or an error, before the untrained model is scored
        trainer.checkpoint_of_run(args.resume_from_checkpoint)
    return Run(task, trainer, data, data_args.prompt, data_args)


def _metrics(task: Task, tokenizer: PreTrainedTokenizerBase, args: LeftTrainingArguments) -> TextMetrics | None:
    return text_metrics(tokenizer, task.metrics, task.main_metric) if args.predict_with_generate else None


def with_task_settings(task: Task, args: LeftTrainingArguments) -> LeftTrainingArguments:
    """A copy of `args` in which the task has decided what the user left open about generation.

    A `generation_config` leaves nothing open. The run is called as its folder, so that trackers find it again to add
    scores and pictures after the training.
    """
    args = args.replaced(run_name=args.run_name or Path(str(args.output_dir)).name)
    if args.generation_config is not None:
        return args
    return args.replaced(
        generation_max_length=args.generation_max_length or task.max_new_tokens,
        generation_num_beams=args.generation_num_beams or task.num_beams,
    )


def score(trainer: LeftTrainer, rows: Dataset) -> PredictionOutput:
    """Predictions and metrics on `rows`; without `predict_with_generate` the loss alone."""
    args = trainer.args
    with trainer.with_arguments(prediction_loss_only=args.prediction_loss_only or not args.predict_with_generate):
        return trainer.predict(rows)


def score_teacher(run: Run, before: PredictionOutput | None = None) -> Scores | None:
    """Scores of the teacher on the test split; `None` where there is none, or none that answers the same prompts.

    Args:
        run: Before its training.
        before: Of the student without its adapter, which is what `base` and `self` are.
    """
    trainer, rows = run.trainer, run.data["test"]
    teacher = trainer.teaching.teacher if trainer.teaching else None
    if teacher is None:
        return None
    if before is not None and teacher.title in (BASE_TEACHER, SELF_TEACHER):
        return before.metrics
    if model_family(without_adapter(teacher.model)) != trainer.family or teacher.tokenizer is None:
        return None
    with answering_as_teacher(trainer, _metrics(run.task, teacher.tokenizer, trainer.args)):
        return score(trainer, rows).metrics


def fine_tune(run: Run) -> TrainingReport:
    """Score, train, score, save, report. Returns the report.

    Raises:
        TrainingDivergedError: The training diverged. The report says so, and no adapter is saved.
        FolderInUseError: Another process runs in `output_dir`.
        WriteFailedError: The disk is full, read-only or gone.
        HubRefusalError: The result is saved, and the hub does not take it.
    """
    args = run.trainer.args
    with folder_lock(str(args.output_dir)) if args.process_index == 0 else contextlib.nullcontext():
        return _fine_tune(run)


def _fine_tune(run: Run) -> TrainingReport:
    trainer, rows = run.trainer, run.data["test"]
    with trainer.without_adapter():
        before = score(trainer, rows)
    teacher = score_teacher(run, before)
    try:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except TrainingDivergedError as error:
        report = build_report(trainer, run.task, before.metrics, None, run.prompt)
        if trainer.is_world_process_zero():
            write_report(trainer, replace(report, diverged_at_step=error.step))
        raise
    after = score(trainer, rows)
    trainer.save_model(_internal_call=True)  # what pushes is below, with card and report
    texts = {"before": before.predictions, "after": after.predictions}
    samples = collect_samples(rows, trainer.processing_class, texts, N_SAMPLES)
    share = majority_share(run.task, rows["target"])
    report = build_report(trainer, run.task, before.metrics, after.metrics, run.prompt, samples, share, teacher)
    report = replace(report, data=run.data_args.given if run.data_args else None)
    if trainer.is_world_process_zero():
        write_report(trainer, report)
        log_pictures(trainer.callback_handler.callbacks, trainer.args, trainer.state.global_step)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    return report
