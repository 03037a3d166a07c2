"""What the decoder of an encoder-decoder model reads, where a batch has nothing but labels."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


def with_decoder_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` with the `decoder_input_ids` that the model makes of its labels, `(batch, target)`.

    Most models make them by themselves, if the labels are among what they are called with. FSMT makes them of the
    source (transformers 5.23).

    Args:
        model: An encoder-decoder model, without an adapter. For any other, nothing is added.
        inputs: A batch. One without labels, or with inputs for the decoder, stays as it is.
    """
    labels = inputs.get("labels")
    is_complete = any(inputs.get(name) is not None for name in DECODER_INPUTS)
    if not model.config.is_encoder_decoder or labels is None or is_complete:
        return dict(inputs)
    return {**inputs, "decoder_input_ids": decoder_input_ids(model, labels)}


def decoder_input_ids(model: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """Labels shifted right behind the token with which the decoder starts, `(batch, target)`."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        return prepare(labels.clone())  # FSMT's writes into its argument (transformers 5.23)
    shift = sys.modules[type(model).__module__].shift_tokens_right
    return shift(labels, model.config.pad_token_id, model.config.decoder_start_token_id)
