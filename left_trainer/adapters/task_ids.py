"""Methods that mix modules by task: which task each row belongs to."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig, PeftModel

TASK_IDS = "task_ids"
COUNT_OPTIONS = ("n_tasks", "num_tasks")  # as Poly and multitask prompt tuning call it


def number_of_tasks(config: PeftConfig | dict[str, Any]) -> int:
    """How many tasks an adapter tells apart; 0 for a method that knows nothing of tasks."""
    values = config if isinstance(config, dict) else vars(config)
    return next((values[option] for option in COUNT_OPTIONS if option in values), 0)


def task_inputs(model: torch.nn.Module, batch_size: int) -> dict[str, torch.Tensor]:
    """`task_ids` of zeros, `(batch,)`, for a model that needs them and knows a single task; empty for any other."""
    if not isinstance(model, PeftModel) or number_of_tasks(model.active_peft_config) != 1:
        return {}
    return {TASK_IDS: torch.zeros(batch_size, dtype=torch.long, device=model.device)}
