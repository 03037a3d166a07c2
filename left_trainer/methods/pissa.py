"""PiSSA: LoRA that starts from the principal singular vectors of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftModel

from left_trainer.adapters.residual_base import RESIDUAL_BASE, lora_layers, remember_initial_adapter
from left_trainer.methods.lora_defaults import DEFAULTS, PLAIN_START
from left_trainer.methods.method import Batches, PeftMethod
from left_trainer.methods.residual_start import RESIDUAL, RESIDUAL_LIMITS
from left_trainer.methods.targets import query_value


def initialize_pissa(model: PeftModel, batches: Batches, options: Mapping[str, Any]) -> None:
    for layer in lora_layers(model).values():
        layer.pissa_init(model.active_adapter, "pissa")
    remember_initial_adapter(model)


PISSA = PeftMethod(
    name="pissa",
    family="reparameterization",
    summary="LoRA that trains the principal singular vectors of the weights themselves",
    paper="Meng et al., 2024, arXiv 2404.02948",
    config_class=LoraConfig,
    narrow_learning_rate=9e-4,
    learning_rate=1e-4,
    learning_rate_source="half of lora's: its start has the largest singular values",
    equation=RESIDUAL + r", \quad s B_0 A_0 = U_r \Sigma_r V_r^\top",
    when_to_use="Faster convergence than LoRA from the same parameters. The adapter is saved as a plain LoRA.",
    defaults={**DEFAULTS, "lora_alpha": 8},
    preset=PLAIN_START,
    resolve_targets=query_value,
    initialize=initialize_pissa,
    training_state=RESIDUAL_BASE,
    unsupported=RESIDUAL_LIMITS,
    mergeable=True,
)
