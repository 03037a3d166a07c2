"""QLoRA: LoRA on a base model in 4 bits."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel
from transformers import BitsAndBytesConfig

from left_trainer.methods.limits import NO_CONV1D, NOT_SHARDED
from left_trainer.methods.lora_defaults import DEFAULTS
from left_trainer.methods.method import PeftMethod


def nf4() -> BitsAndBytesConfig:
    """QLoRA's quantization: 4-bit NormalFloat with quantized constants."""
    compute = torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def keep_unpacked(model: PeftModel) -> None:
    """Keep 4-bit layers on the CPU in the format that has gradients.

    The first evaluation would repack their weights for an inference kernel without a backward pass, and training would
    go on without the gradients that should flow through them (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


QLORA = PeftMethod(
    name="qlora",
    family="reparameterization",
    summary="LoRA on every linear layer of a base model in 4 bits (NF4, double quantization)",
    paper="Dettmers et al., 2023, arXiv 2305.14314",
    config_class=LoraConfig,
    narrow_learning_rate=6e-4,
    learning_rate=2e-4,
    learning_rate_source="Dettmers et al., 2023, table 9, models up to 13B",
    equation=r"W' = \mathrm{dequantize}(W_{\mathrm{NF4}}) + \tfrac{\alpha}{r} B A",
    when_to_use="A model that does not fit into memory otherwise: the base takes about half a byte a weight.",
    defaults={**DEFAULTS, "target_modules": "all-linear"},
    quantization=nf4,
    prepare=keep_unpacked,
    unsupported={**NO_CONV1D, **NOT_SHARDED},
    requires={"bitsandbytes": "bitsandbytes"},
)
