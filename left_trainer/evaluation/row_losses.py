"""The loss of each row of an encoder-decoder model's batch, from the encoder's output that generation used."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from left_trainer.adapters.task_ids import number_of_tasks
from left_trainer.kernels.output_head import loss_at_output_head, why_not_at_output_head
from left_trainer.methods.apply import find_method
from left_trainer.models import without_adapter

SOURCES = ("input_ids", "attention_mask")


def why_not_shared_encoder(model: PreTrainedModel | PeftModel) -> str | None:
    """Why generation and loss of `model` cannot share the encoder's output; `None` where they can."""
    if isinstance(model, PeftModel):
        method = find_method(model)
        if method is None:
            return "the adapter is of no registered method"
        if method.virtual_tokens is not None:
            return "the adapter puts virtual tokens into the sequence"
        if number_of_tasks(model.active_peft_config):
            return "the adapter needs task_ids"
        model = model.get_base_model()
    if not model.config.is_encoder_decoder:
        return "the model has no encoder"
    return why_not_at_output_head(model)


def encode(model: PreTrainedModel | PeftModel, inputs: dict[str, torch.Tensor]) -> Any:
    """What the encoder makes of `input_ids`, `(batch, source)`, as `generate` computes it."""
    base = without_adapter(model)
    return base.get_encoder()(**{name: inputs[name] for name in SOURCES if name in inputs}, return_dict=True)


def row_losses(
    model: PreTrainedModel | PeftModel,
    encoder_outputs: Any,
    inputs: dict[str, torch.Tensor],
    label_smoothing: float,
    workspace_bytes: int,
) -> torch.Tensor:
    """Loss summed over each row's target tokens, `(batch,)`.

    Args:
        model: One for which `why_not_shared_encoder` is `None`.
        encoder_outputs: From `encode`.
        inputs: `attention_mask` and `labels`, `(batch, source)` and `(batch, target)`.
        label_smoothing: As in `linear_cross_entropy`.
        workspace_bytes: The same.
    """
    base = without_adapter(model)
    with loss_at_output_head(base, label_smoothing, workspace_bytes) as captured:
        base(
            encoder_outputs=type(encoder_outputs)(**encoder_outputs),
            attention_mask=inputs.get("attention_mask"),
            labels=inputs["labels"],
        )
    assert captured.tokens is not None  # or the call above would have raised
    return captured.tokens.row_sums
