"""The column `task_ids`, for methods that tell tasks apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel

from left_trainer.adapters.task_ids import TASK_IDS, number_of_tasks, task_inputs
from left_trainer.models import without_adapter


def with_task_ids(model: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch with zeros for the task of each row, where the method knows a single one and the batch names none."""
    return task_inputs(model, len(next(iter(inputs.values())))) | inputs


def with_columns_for(
    collator: Callable[..., Any] | None, model: torch.nn.Module, columns: list[str] | None
) -> list[str] | None:
    """The columns with all that the base model takes, where the user's collator makes the batches.

    TRL keeps those that its own collator reads, and drops `attention_mask` from rows that are padded already.
    """
    if collator is None or columns is None:
        return columns
    return list(dict.fromkeys([*columns, *inspect.signature(without_adapter(model).forward).parameters]))


def with_task_column(model: torch.nn.Module, columns: Sequence[str] | None) -> list[str] | None:
    """The columns that the base model's forward takes, with the one that the adapter's takes beside."""
    if isinstance(model, PeftModel) and number_of_tasks(model.active_peft_config):
        return list(dict.fromkeys([*(columns or ()), TASK_IDS]))
    return None if columns is None else list(columns)
