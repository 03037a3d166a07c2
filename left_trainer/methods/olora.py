"""OLoRA: LoRA that starts from an orthonormal basis of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from left_trainer.adapters.residual_base import RESIDUAL_BASE, lora_layers, remember_initial_adapter
from left_trainer.methods.limits import NO_CONV1D
from left_trainer.methods.lora_defaults import DEFAULTS, PLAIN_START
from left_trainer.methods.method import Batches, PeftMethod
from left_trainer.methods.residual_start import RESIDUAL, RESIDUAL_LIMITS
from left_trainer.methods.targets import query_value


def initialize_olora(model: PeftModel, batches: Batches, options: Mapping[str, Any]) -> None:
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.olora_init(model.active_adapter)
    remember_initial_adapter(model)


OLORA = PeftMethod(
    name="olora",
    family="reparameterization",
    summary="LoRA that starts from an orthonormal basis of the weights",
    paper="Büyükakyüz, 2024, arXiv 2406.01775",
    config_class=LoraConfig,
    narrow_learning_rate=9e-4,
    learning_rate=2e-4,
    learning_rate_source="that of lora",
    equation=RESIDUAL + r", \quad W = Q R, \; B_0 = Q_{:, :r}, \; A_0 = R_{:r}",
    when_to_use="Like PiSSA with a QR instead of a singular value decomposition, which is cheaper.",
    defaults={**DEFAULTS, "lora_alpha": 8},
    preset=PLAIN_START,
    resolve_targets=query_value,
    initialize=initialize_olora,
    training_state=RESIDUAL_BASE,
    unsupported={**RESIDUAL_LIMITS, **NO_CONV1D},
    mergeable=True,
)
