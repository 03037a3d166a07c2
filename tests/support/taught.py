"""Trainings of a tiny student with a tiny teacher."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from left_trainer import LeftTrainer, LeftTrainingArguments
from tiny import FAMILY_TYPES, tiny_model, tiny_rows, tiny_tokenizer

TEACHERS_SEED = 3


def taught(output_dir: Any, family: str, teacher: Any = None, rows: Any = None, **overrides: Any) -> LeftTrainer:
    """A trainer of four steps.

    Args:
        output_dir: Of the run.
        family: Of the student.
        teacher: By default a model like the student.
        rows: By default sixteen.
        overrides: Options of the distillation, and under `arguments` of the training.
    """
    given: dict[str, Any] = {
        "output_dir": str(output_dir),
        "peft_method": "lora",
        "learning_rate": 1e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "generation_max_length": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
        **overrides.pop("arguments", {}),
    }
    kept = {
        name: overrides.pop(name) for name in ("data_collator", "callbacks", "formatting_func") if name in overrides
    }
    return LeftTrainer(
        tiny_model(FAMILY_TYPES[family]),
        LeftTrainingArguments(**given, distillation_kwargs=overrides),
        train_dataset=Dataset.from_list(tiny_rows()) if rows is None else rows,
        processing_class=tiny_tokenizer(family),
        teacher_model=tiny_model(FAMILY_TYPES[family], seed=TEACHERS_SEED) if teacher is None else teacher,
        **kept,
    )


def logged(trainer: LeftTrainer, *names: str) -> list[list[float]]:
    """Values that were logged with each loss."""
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]
