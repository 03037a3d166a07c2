"""X-LoRA: trained LoRA adapters, mixed by a classifier of the hidden states."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, XLoraConfig
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from left_trainer.adapters.training_state import TRAINED_PARAMETERS
from left_trainer.methods.method import PeftMethod
from left_trainer.token_mean import accumulated_token_loss


def numbered_experts(model: PreTrainedModel, config: PeftConfig) -> dict[str, Any]:
    """Number the experts, which PEFT loads under numbers and then looks for under the names given (peft 0.21)."""
    config.adapters = {str(number): path for number, path in enumerate(config.adapters.values())}
    return {"hidden_size": model.config.get_text_config().hidden_size}


def save_with_classifier(model: PeftModel) -> None:
    """Make `save_pretrained` write X-LoRA's classifier, which PEFT leaves out of the adapter file (peft 0.21)."""

    def save(model: PeftModel, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        type(model).save_pretrained(model, save_directory, *args, **kwargs)
        weights = {name: tensor for name, tensor in model.state_dict().items() if "internal_xlora_classifier" in name}
        save_file(weights, Path(save_directory) / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    model.save_pretrained = types.MethodType(save, model)


def loss_from_logits(
    model: PeftModel, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None, ranks: int
) -> tuple[torch.Tensor, Any]:
    """The token mean by the model's own forward: X-LoRA reads hidden states, which TRL's fused head does not return."""
    outputs = model(**inputs)
    return accumulated_token_loss(outputs.loss, inputs["labels"], num_items_in_batch, ranks), outputs


XLORA = PeftMethod(
    name="xlora",
    family="reparameterization",
    summary="trained LoRA adapters, mixed by a classifier of the hidden states",
    paper="Buehler and Buehler, 2024, arXiv 2402.07148",
    config_class=XLoraConfig,
    narrow_learning_rate=3e-3,
    learning_rate=2e-4,
    learning_rate_source="that of lora",
    equation=r"W' x = W x + \textstyle\sum_k g_k(h) \, s_k B_k A_k x",
    when_to_use="Several adapters of one base model, each good at something, to be combined for every token.",
    model_config={"use_cache": False},  # the classifier sees whole sequences
    defaults={"hidden_size": 1},
    derive=numbered_experts,
    prepare=save_with_classifier,
    loss=loss_from_logits,
    training_state=TRAINED_PARAMETERS,  # PEFT does not load its classifier into a model that has one
    required={"adapters": "a dict from names to the folders of LoRA adapters of this base model, at least one."},
    unsupported={
        "shrinking": "its classifier has outputs for each layer.",
        "encoder_decoder": "PEFT's classifier reads the hidden states of decoder-only models.",
        "gradient_checkpointing": "the scalings of its first forward pass are not recomputed.",
    },
)
