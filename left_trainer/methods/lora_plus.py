"""LoRA+: a higher learning rate for B than for A."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch.optim import Optimizer

from left_trainer.methods.lora_defaults import DEFAULTS, LOW_RANK
from left_trainer.methods.method import PeftMethod
from left_trainer.methods.targets import query_value


def lora_plus_optimizer(
    model: PeftModel, optimizer_class: type[Optimizer], arguments: Mapping[str, Any], options: Mapping[str, Any]
) -> Optimizer:
    """The chosen optimizer with `loraplus_lr_ratio` times the learning rate for B."""
    arguments = dict(arguments)
    return create_loraplus_optimizer(
        model,
        optimizer_class,
        loraplus_lr_ratio=options["loraplus_lr_ratio"],
        loraplus_weight_decay=arguments.pop("weight_decay"),
        **arguments,
    )


LORA_PLUS = PeftMethod(
    name="lora_plus",
    family="reparameterization",
    summary="LoRA with a higher learning rate for B than for A",
    paper="Hayou et al., 2024, arXiv 2402.12354",
    config_class=LoraConfig,
    narrow_learning_rate=3e-4,
    learning_rate=1e-4,
    learning_rate_source="half of lora's, as B learns faster",
    equation=LOW_RANK + r", \quad \eta_B = \lambda \eta_A",
    when_to_use="As LoRA; it learns faster, the more so the wider the model. Only the optimizer differs.",
    defaults=DEFAULTS,
    resolve_targets=query_value,
    hook_options={"loraplus_lr_ratio": 16.0},
    optimizer=lora_plus_optimizer,
    mergeable=True,
)
