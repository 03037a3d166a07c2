"""Scoring a saved model on a file of test rows, as the run that saved it does."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from left_trainer.adapters.run_settings import RunSettings
from left_trainer.data.arguments import DataArguments
from left_trainer.data.loading import load_test_rows
from left_trainer.data.prompts import to_prompts
from left_trainer.evaluation.generation import scored_generation_config
from left_trainer.evaluation.scores import without_prefix
from left_trainer.evaluation.text_metrics import text_metrics
from left_trainer.methods.saving import adapter_method, adapter_positions
from left_trainer.models import load_tokenizer, without_adapter
from left_trainer.runs.build_report import collect_samples
from left_trainer.runs.fine_tuning import N_SAMPLES, TASK_DEFAULTS
from left_trainer.runs.inference import folder_of, source_for_use, stored_generation_config
from left_trainer.runs.json_records import write_json
from left_trainer.runs.measurements import machine_name
from left_trainer.runs.report import REPORT_FILE, Sample, Scores, TrainingReport
from left_trainer.storage.errors import write_errors
from left_trainer.tasks import Task, get_task
from left_trainer.tasks.task import check_prompt
from left_trainer.trainer import LeftTrainer
from left_trainer.trainer.model_card import package_versions
from left_trainer.trainer.run_checks import check_generation
from left_trainer.training_args import LeftTrainingArguments

EVALUATION_FILE = "evaluation_report.json"


@dataclass(frozen=True)
class EvaluationReport:
    """Scores of a saved model on test rows; `evaluation_report.json` holds it.

    Args:
        model: Folder or name of what was scored.
        base_model: Of an adapter; the model itself otherwise.
        method: What was trained; `None` where the folder does not say.
        task: Whose metrics these are.
        prompt: Template of the prompts.
        test_file: With the rows.
        test_rows: Their number.
        metrics: Scores by name, without a prefix.
        num_beams: Of the generation; 1 is greedy.
        max_new_tokens: Length limit of an answer; `None` where another setting limits it.
        samples: The first rows with what the model wrote.
        versions: Of packages.
        device: On which it ran.
        machine: Processor, cores and GPU.
    """

    model: str
    base_model: str
    method: str | None
    task: str
    prompt: str
    test_file: str
    test_rows: int
    metrics: Scores
    num_beams: int
    max_new_tokens: int | None
    samples: tuple[Sample, ...]
    versions: Mapping[str, str | None]
    device: str
    machine: str

    def write(self, folder: str | Path) -> Path:
        """Write `evaluation_report.json` into `folder`, whole."""
        path = Path(folder) / EVALUATION_FILE
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self)
        return path


@dataclass(frozen=True)
class Evaluation:
    """What is asked for; `None` stands for what the run has stored, and where it has stored nothing, for the default.

    Args:
        path: Folder of an adapter or of a whole model, or its name on the Hub.
        data: `test_file`, the columns, the prompt and `max_eval_samples` are read.
        task: Name of the task.
        generation_num_beams: 1 is greedy.
        generation_max_length: Most new tokens of an answer.
        max_length: As in training.
        per_device_eval_batch_size: Rows of a batch.
        trust_remote_code: Whether code that comes with the base model may run.
        dtype: Of the base model's weights.
        hub: `revision` and `token` of a name on the Hub.
    """

    path: str
    data: DataArguments
    task: str | None = None
    generation_num_beams: int | None = None
    generation_max_length: int | None = None
    max_length: int | None = None
    per_device_eval_batch_size: int | None = None
    trust_remote_code: bool = False
    dtype: str | None = None
    hub: Mapping[str, Any] = field(default_factory=dict)


def evaluate_saved(asked: Evaluation) -> EvaluationReport:
    """Score a saved model on test rows, by the prediction of its own trainer: the scores that a run reports.

    Raises:
        ValueError: No task or prompt is known, or the rows, the model or an adapter cannot be used.
        FileNotFoundError: The test file does not exist.
    """
    source = source_for_use(asked.path, asked.trust_remote_code, asked.dtype, asked.hub)
    task, prompt = _task_and_prompt(asked, folder_of(source))
    rows = load_test_rows(task, asked.data)
    check_generation(asked.generation_num_beams, asked.generation_max_length, source.config)
    settings = source.settings or RunSettings()
    tokenizer = load_tokenizer(source)
    with tempfile.TemporaryDirectory() as folder:
        args = _arguments(asked, settings, folder, is_adapter=source.adapter is not None)
        trainer = LeftTrainer(
            source,
            args,
            train_dataset=Dataset.from_list([task.render("a", "b", prompt)]),  # which TRL asks for
            processing_class=tokenizer,
            compute_metrics=text_metrics(tokenizer, task.metrics, task.main_metric),
        )
        model = without_adapter(trainer.model)
        given = {"num_beams": asked.generation_num_beams, "max_new_tokens": asked.generation_max_length}
        stored = stored_generation_config(folder_of(source), trainer.model)
        config = scored_generation_config(stored, {name: value for name, value in given.items() if value})
        model.generation_config = config
        prompts = _prompts(rows, task, prompt, trainer, config.max_new_tokens or 0)
        limits = {"max_new_tokens": config.max_new_tokens, "num_beams": config.num_beams}
        result = trainer.predict(prompts, **{name: value for name, value in limits.items() if value})
    method = adapter_method(source)
    return EvaluationReport(
        model=asked.path,
        base_model=source.base_name,
        method=method.name if method else settings.method,
        task=task.name,
        prompt=prompt,
        test_file=str(asked.data.test_file),
        test_rows=len(rows),
        metrics=without_prefix(result.metrics),
        num_beams=config.num_beams or 1,
        max_new_tokens=config.max_new_tokens,
        samples=collect_samples(prompts, tokenizer, {"prediction": result.predictions}, N_SAMPLES),
        versions=package_versions(),
        device=str(args.device),
        machine=machine_name(),
    )


def _task_and_prompt(asked: Evaluation, folder: str) -> tuple[Task, str]:
    """Those asked for, else those of the run's report in `folder`, else, for the prompt, that of the task."""
    known = (Path(folder) / REPORT_FILE).is_file()
    report = TrainingReport.read(folder) if known else None
    name = asked.task or (report.task if report else None)
    if name is None:
        raise ValueError(
            f"{asked.path!r} has no {REPORT_FILE} to read the task from, and so its metrics. Pass --task, for example "
            "--task summarization."
        )
    task = get_task(name)
    same_task = report is not None and asked.task in (None, report.task)
    prompt = asked.data.prompt or (report.prompt if report and same_task else task.prompt)
    check_prompt(prompt)
    return task, prompt


def _arguments(asked: Evaluation, settings: RunSettings, folder: str, is_adapter: bool) -> LeftTrainingArguments:
    options: dict[str, Any] = {} if is_adapter else {"peft_method": "full"}
    if asked.max_length or settings.method:
        options["max_length"] = asked.max_length or settings.max_length
    return LeftTrainingArguments(
        output_dir=folder,
        predict_with_generate=True,
        per_device_eval_batch_size=(
            asked.per_device_eval_batch_size
            or settings.per_device_eval_batch_size
            or TASK_DEFAULTS["per_device_eval_batch_size"]
        ),
        truncation_mode=settings.truncation_mode,
        report_to="none",
        **options,
    )


def _prompts(rows: Dataset, task: Task, prompt: str, trainer: LeftTrainer, max_new_tokens: int) -> Dataset:
    reserved = adapter_positions(trainer.source).source
    return to_prompts(
        rows, task, trainer.processing_class, trainer.source, trainer.args.max_length, prompt, reserved, max_new_tokens
    )
