"""LoftQ: QLoRA that starts by making up for the quantization error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils.loftq_utils import _SafetensorLoader

from left_trainer.adapters.residual_base import lora_layers
from left_trainer.methods.limits import NO_CONV1D, NOT_SHARDED
from left_trainer.methods.lora_defaults import DEFAULTS, PLAIN_START
from left_trainer.methods.method import Batches, PeftMethod
from left_trainer.methods.qlora import keep_unpacked, nf4


@torch.no_grad()
def initialize_loftq(model: PeftModel, batches: Batches, options: Mapping[str, Any]) -> None:
    r"""Fit A and B to what quantization lost: $s B A \approx W - \mathrm{dequantize}(Q)$, from the weights on disk.

    PEFT's `replace_lora_weights_loftq` needs a GPU and leaves the scaling out, so that alpha = 2r adds the error twice
    over (peft 0.21).
    """
    from bitsandbytes.functional import dequantize_4bit

    name = model.get_base_model().config._name_or_path
    original = _SafetensorLoader(model, name if Path(name).is_dir() else None)
    adapter = model.active_adapter
    for layer_name, layer in lora_layers(model).items():
        quantized = layer.get_base_layer().weight
        if not hasattr(quantized, "quant_state"):
            continue  # T5 keeps some of its layers in float32
        weight = original.get_tensor(f"{layer_name.removeprefix('base_model.model.')}.weight").to(quantized.device)
        error = weight.float() - dequantize_4bit(quantized.data, quantized.quant_state).float()
        rank, scaling = layer.r[adapter], layer.scaling[adapter]
        left, values, right = torch.linalg.svd(error, full_matrices=False)
        root = (values[:rank] / scaling).sqrt()
        layer.lora_A[adapter].weight.copy_(root[:, None] * right[:rank])
        layer.lora_B[adapter].weight.copy_(left[:, :rank] * root)


LOFTQ = PeftMethod(
    name="loftq",
    family="reparameterization",
    summary="QLoRA whose adapter starts by making up for the quantization error",
    paper="Li et al., 2023, arXiv 2310.08659",
    config_class=LoraConfig,
    narrow_learning_rate=6e-4,
    learning_rate=2e-4,
    learning_rate_source="that of qlora",
    equation=r"\min_{A, B} \lVert W - \mathrm{dequantize}(W_{\mathrm{NF4}}) - s B A \rVert_F",
    when_to_use="Instead of qlora when the quantized base alone is visibly worse than the original.",
    defaults={**DEFAULTS, "target_modules": "all-linear"},
    preset=PLAIN_START,
    quantization=nf4,
    prepare=keep_unpacked,
    initialize=initialize_loftq,
    unsupported={**NO_CONV1D, **NOT_SHARDED},
    requires={"bitsandbytes": "bitsandbytes"},
)
