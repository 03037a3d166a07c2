"""All fused layers of a model: a new one is one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from left_trainer.kernels.fast_paths import GATED_MLP, GELU, LORA_LINEAR, RMS_NORM, FastPath
from left_trainer.kernels.gated_mlp import use_fused_gated_mlp
from left_trainer.kernels.gelu import use_fused_gelu
from left_trainer.kernels.lora_layers import use_lora_linear
from left_trainer.kernels.rms_norm import use_fused_rms_norm

if TYPE_CHECKING:
    from left_trainer.training_args import LeftTrainingArguments

# Puts them in or takes them out, by their name in reports. The name of the function is that of the switch.
FUSED_LAYERS: dict[str, Callable[[nn.Module, bool], FastPath]] = {
    LORA_LINEAR: use_lora_linear,
    GELU: use_fused_gelu,
    RMS_NORM: use_fused_rms_norm,
    GATED_MLP: use_fused_gated_mlp,
}


def use_fused_layers(model: nn.Module, args: LeftTrainingArguments | None = None) -> dict[str, FastPath]:
    """Give the layers of `model` their fused forward passes, or their own.

    Args:
        model: Changed in place.
        args: Says which; by default all.

    Returns:
        What counts the calls, by name in reports.
    """
    return {name: use(model, args is None or getattr(args, use.__name__)) for name, use in FUSED_LAYERS.items()}
