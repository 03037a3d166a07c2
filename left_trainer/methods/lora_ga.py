"""LoRA-GA: LoRA whose first step follows the gradient of full fine-tuning."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import PreTrainedModel

from left_trainer.adapters.residual_base import RESIDUAL_BASE, lora_layers, remember_initial_adapter
from left_trainer.methods.lora_defaults import DEFAULTS, PLAIN_START
from left_trainer.methods.method import Batches, PeftMethod
from left_trainer.methods.residual_start import RESIDUAL, RESIDUAL_LIMITS, on_base_layers
from left_trainer.methods.targets import query_value, smallest_feature


def half_rank(model: PreTrainedModel, config: PeftConfig) -> dict[str, Any]:
    """LoRA-GA takes A and B from different singular vectors of one gradient, which has to have twice the rank."""
    return {"r": min(config.r, smallest_feature(model, config) // 2)}


def initialize_lora_ga(model: PeftModel, batches: Batches, options: Mapping[str, Any]) -> None:
    """Factor the gradients of the targeted base weights, summed over `calibration_batches` batches."""
    config = on_base_layers(model)
    config.lora_ga_config = LoraGAConfig()

    def run() -> None:
        for batch in batches(options["calibration_batches"]):
            model(**batch).loss.backward()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # about PEFT's counters of backward passes
        preprocess_loraga(model, config, train_step=run)
    for layer in lora_layers(model).values():
        layer.lora_ga_init(model.active_adapter, config.lora_ga_config)
    remember_initial_adapter(model)


LORA_GA = PeftMethod(
    name="lora_ga",
    family="reparameterization",
    summary="LoRA whose first step follows the gradient of full fine-tuning",
    paper="Wang et al., 2024, arXiv 2407.05000",
    config_class=LoraConfig,
    narrow_learning_rate=9e-4,
    learning_rate=1e-4,
    learning_rate_source="that of pissa",
    equation=RESIDUAL + r", \quad \nabla_W \mathcal{L} = U \Sigma V^\top, \; A_0, B_0 \text{ from } V_{2r}, U_{2r}",
    when_to_use="Few steps to train for: the start is chosen from the gradients of the first batches.",
    defaults=DEFAULTS,
    preset=PLAIN_START,
    resolve_targets=query_value,
    derive=half_rank,
    hook_options={"calibration_batches": 8},
    initialize=initialize_lora_ga,
    training_state=RESIDUAL_BASE,
    unsupported=RESIDUAL_LIMITS,
    mergeable=True,
)
