"""Poly: a shared inventory of LoRA modules, mixed for each task."""

from __future__ import annotations

from typing import Any

from peft import PeftModel, PolyConfig
from peft.tuners.poly.router import PolyRouter
from torch import nn

from left_trainer.methods.limits import LINEAR_ONLY
from left_trainer.methods.method import PeftMethod
from left_trainer.methods.targets import query_value


def repeat_task_ids(model: PeftModel) -> None:
    """Give each beam the task of its row: PEFT's Poly keeps one task for each row of the input (peft 0.21)."""

    def repeat(router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tasks, rows = kwargs["task_ids"], len(kwargs["input_ids"])
        return args, {**kwargs, "task_ids": tasks.repeat_interleave(rows // len(tasks))}

    for module in model.modules():
        if isinstance(module, PolyRouter):
            module.register_forward_pre_hook(repeat, with_kwargs=True)


POLY = PeftMethod(
    name="poly",
    family="reparameterization",
    summary="a shared inventory of LoRA modules, mixed by trained weights for each task",
    paper="Ponti et al., 2022, arXiv 2202.13914",
    config_class=PolyConfig,
    narrow_learning_rate=1.5e-2,
    learning_rate=5e-4,
    learning_rate_source="judgement: as much below the small models' as adalora's",
    equation=r"W' = W + \textstyle\sum_k \alpha_{t k} B_k A_k",
    when_to_use="Several tasks at once that share skills: give each row a `task_ids` column and set `n_tasks`.",
    defaults={"n_tasks": 1},
    resolve_targets=query_value,
    prepare=repeat_task_ids,
    unsupported={**LINEAR_ONLY, "gradient_checkpointing": "recomputation does not see the task ids."},
    aliases=("polytropon",),
)
