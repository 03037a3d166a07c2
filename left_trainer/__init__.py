"""LEFT: LLM efficient fine-tuning for people who already use Hugging Face.

Names are imported when they are first used, so that `import left_trainer` costs milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from left_trainer.imports import without_collection
from left_trainer.tuners.import_hook import register_with_peft

if TYPE_CHECKING:
    from left_trainer.callbacks import (
        AdapterRestoreCallback,
        AdapterSaverCallback,
        MemoryProfilerCallback,
        TrainableParametersCallback,
    )
    from left_trainer.callbacks.step_timer import StepTimerCallback
    from left_trainer.cli.errors import user_errors
    from left_trainer.cli.program import run_program
    from left_trainer.data.arguments import DataArguments, ModelArguments
    from left_trainer.data.loading import load_task_data, prepare_task_data
    from left_trainer.embedded import MODEL_PATHS
    from left_trainer.evaluation.text_metrics import decode, text_metrics
    from left_trainer.methods import PeftMethod, apply_method, get_method, list_methods, register_method
    from left_trainer.models import ModelSource, load_tokenizer
    from left_trainer.planning.before_run import announce_plan
    from left_trainer.planning.plan import TrainingPlan, plan_training
    from left_trainer.runs.build_report import build_report, collect_samples, write_report
    from left_trainer.runs.fine_tuning import fine_tune, score, set_up, training_parser, with_task_settings
    from left_trainer.runs.report import TrainingReport
    from left_trainer.runs.report_text import format_report
    from left_trainer.runs.training_parser import ScriptParser
    from left_trainer.tasks import HubDataset, Task, get_task, list_tasks, register_task
    from left_trainer.trainer import LeftSeq2SeqTrainer, LeftSFTTrainer, LeftTrainer
    from left_trainer.trainer.divergence import TrainingDivergedError
    from left_trainer.training_args import LeftTrainingArguments

__version__ = "0.2.0"

_HOMES = {
    "AdapterRestoreCallback": "left_trainer.callbacks",
    "AdapterSaverCallback": "left_trainer.callbacks",
    "DataArguments": "left_trainer.data.arguments",
    "HubDataset": "left_trainer.tasks",
    "LeftSFTTrainer": "left_trainer.trainer",
    "LeftSeq2SeqTrainer": "left_trainer.trainer",
    "LeftTrainer": "left_trainer.trainer",
    "LeftTrainingArguments": "left_trainer.training_args",
    "MODEL_PATHS": "left_trainer.embedded",
    "MemoryProfilerCallback": "left_trainer.callbacks",
    "ModelArguments": "left_trainer.data.arguments",
    "ModelSource": "left_trainer.models",
    "PeftMethod": "left_trainer.methods",
    "ScriptParser": "left_trainer.runs.training_parser",
    "StepTimerCallback": "left_trainer.callbacks.step_timer",
    "Task": "left_trainer.tasks",
    "TrainableParametersCallback": "left_trainer.callbacks",
    "TrainingPlan": "left_trainer.planning.plan",
    "TrainingDivergedError": "left_trainer.trainer.divergence",
    "TrainingReport": "left_trainer.runs.report",
    "announce_plan": "left_trainer.planning.before_run",
    "apply_method": "left_trainer.methods",
    "build_report": "left_trainer.runs.build_report",
    "collect_samples": "left_trainer.runs.build_report",
    "decode": "left_trainer.evaluation.text_metrics",
    "fine_tune": "left_trainer.runs.fine_tuning",
    "format_report": "left_trainer.runs.report_text",
    "run_program": "left_trainer.cli.program",
    "get_method": "left_trainer.methods",
    "get_task": "left_trainer.tasks",
    "list_methods": "left_trainer.methods",
    "list_tasks": "left_trainer.tasks",
    "load_task_data": "left_trainer.data.loading",
    "load_tokenizer": "left_trainer.models",
    "plan_training": "left_trainer.planning.plan",
    "prepare_task_data": "left_trainer.data.loading",
    "register_method": "left_trainer.methods",
    "register_task": "left_trainer.tasks",
    "score": "left_trainer.runs.fine_tuning",
    "set_up": "left_trainer.runs.fine_tuning",
    "text_metrics": "left_trainer.evaluation.text_metrics",
    "training_parser": "left_trainer.runs.fine_tuning",
    "user_errors": "left_trainer.cli.errors",
    "with_task_settings": "left_trainer.runs.fine_tuning",
    "write_report": "left_trainer.runs.build_report",
}
__all__ = [
    "MODEL_PATHS",
    "AdapterRestoreCallback",
    "AdapterSaverCallback",
    "DataArguments",
    "HubDataset",
    "LeftSFTTrainer",
    "LeftSeq2SeqTrainer",
    "LeftTrainer",
    "LeftTrainingArguments",
    "MemoryProfilerCallback",
    "ModelArguments",
    "ModelSource",
    "PeftMethod",
    "ScriptParser",
    "StepTimerCallback",
    "Task",
    "TrainableParametersCallback",
    "TrainingDivergedError",
    "TrainingPlan",
    "TrainingReport",
    "__version__",
    "announce_plan",
    "apply_method",
    "build_report",
    "collect_samples",
    "decode",
    "fine_tune",
    "format_report",
    "get_method",
    "get_task",
    "list_methods",
    "list_tasks",
    "load_task_data",
    "load_tokenizer",
    "plan_training",
    "prepare_task_data",
    "register_method",
    "register_task",
    "run_program",
    "score",
    "set_up",
    "text_metrics",
    "training_parser",
    "user_errors",
    "with_task_settings",
    "write_report",
]

register_with_peft()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with without_collection():
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
