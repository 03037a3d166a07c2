"""CorDA: LoRA that starts from directions chosen by the covariance of the inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda

from left_trainer.adapters.residual_base import RESIDUAL_BASE, lora_layers, remember_initial_adapter
from left_trainer.methods.lora_defaults import DEFAULTS, PLAIN_START
from left_trainer.methods.method import Batches, PeftMethod
from left_trainer.methods.residual_start import RESIDUAL, RESIDUAL_LIMITS, on_base_layers
from left_trainer.methods.targets import query_value
from left_trainer.token_mean import IGNORE_INDEX


def initialize_corda(model: PeftModel, batches: Batches, options: Mapping[str, Any]) -> None:
    """Decompose the weights by the covariance of the inputs in `calibration_batches` batches."""
    config = on_base_layers(model)
    config.corda_config = CordaConfig(corda_method=options["corda_method"])

    def run() -> None:
        for batch in batches(options["calibration_batches"]):
            for row in _single_rows(batch):
                model(**row)

    was_training = model.training
    with torch.no_grad():
        preprocess_corda(model, config, run_model=run)
        for layer in lora_layers(model).values():
            layer.corda_init(model.active_adapter, "corda")
    model.train(was_training)
    remember_initial_adapter(model)


def _single_rows(batch: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The rows of a batch one by one and without padding, as PEFT's covariance expects them."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    for index, kept in enumerate(mask):
        row = {"input_ids": batch["input_ids"][index][kept][None]}
        labels = batch["labels"][index]
        # A decoder-only model has a label at each position of its input; a decoder of its own has other ones.
        row["labels"] = labels[kept if labels.shape == kept.shape else labels.ne(IGNORE_INDEX)][None]
        yield row


CORDA = PeftMethod(
    name="corda",
    family="reparameterization",
    summary="LoRA that starts from directions chosen by the covariance of the inputs",
    paper="Yang et al., 2024, arXiv 2406.05223",
    config_class=LoraConfig,
    narrow_learning_rate=6e-4,
    learning_rate=1e-4,
    learning_rate_source="that of pissa",
    equation=RESIDUAL + r", \quad \mathrm{SVD}(W C) C^{-1}, \; C = X X^\top",
    when_to_use="Adapting to the data at hand (`ipm`) or keeping what the base knows (`kpm`), by `corda_method`.",
    defaults={**DEFAULTS, "lora_alpha": 8},
    preset=PLAIN_START,
    resolve_targets=query_value,
    hook_options={"corda_method": "ipm", "calibration_batches": 16},
    initialize=initialize_corda,
    training_state=RESIDUAL_BASE,
    unsupported=RESIDUAL_LIMITS,
    mergeable=True,
)
