"""What PiSSA, OLoRA, CorDA and LoRA-GA share: they start from a part of the base weights."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel

from left_trainer.adapters.residual_base import lora_layers
from left_trainer.methods.method import Feature

RESIDUAL = r"W' = (W - s B_0 A_0) + s B A"
RESIDUAL_LIMITS: dict[Feature, str] = {
    "quantized_base": "its initialisation moves a part of the base weights into the adapter."
}


def on_base_layers(model: PeftModel) -> Any:
    """The adapter's config, aimed at the layers inside of its own."""
    config = copy.deepcopy(model.active_peft_config)
    config.target_modules = {f"{name}.base_layer" for name in lora_layers(model)}
    return config
