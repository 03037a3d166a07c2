"""LoRA-FA: A is frozen and the gradient of B projected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.optimizers import create_lorafa_optimizer
from torch.optim import Optimizer

from left_trainer.methods.learning_rates import metamathqa
from left_trainer.methods.lora_defaults import DEFAULTS, LOW_RANK
from left_trainer.methods.method import PeftMethod
from left_trainer.methods.targets import query_value


def lora_fa_optimizer(
    model: PeftModel, optimizer_class: type[Optimizer], arguments: Mapping[str, Any], options: Mapping[str, Any]
) -> Optimizer:
    """AdamW on B with projected gradients; A is frozen.

    Raises:
        ValueError: Another optimizer than AdamW was chosen, which LoRA-FA would ignore.
    """
    if optimizer_class is not torch.optim.AdamW:
        raise ValueError(
            f"optim asks for {optimizer_class.__name__}, but peft_method='lora_fa' is a form of AdamW. Leave optim at "
            "its default, or choose peft_method='lora'."
        )
    config = model.active_peft_config
    return create_lorafa_optimizer(
        model, config.r, config.lora_alpha, arguments["lr"], weight_decay=arguments["weight_decay"]
    )


LORA_FA = PeftMethod(
    name="lora_fa",
    family="reparameterization",
    summary="LoRA with A frozen and the gradient of B projected, which stores no activations for A",
    paper="Zhang et al., 2023, arXiv 2308.03303",
    config_class=LoraConfig,
    narrow_learning_rate=3e-3,
    learning_rate=3e-4,
    learning_rate_source=metamathqa(1e-4, 40.4) + "; above it, because it reaches less than lora there",
    equation=LOW_RANK + r", \quad A = A_0",
    when_to_use="Less activation memory and half of LoRA's optimizer state.",
    defaults=DEFAULTS,
    resolve_targets=query_value,
    optimizer=lora_fa_optimizer,
    unsupported={"narrowing": "its optimizer keeps its state by name, which cannot be cut along."},
    mergeable=True,
)
