"""The tanh form of GELU in one operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import NewGELUActivation

from left_trainer.kernels.fast_paths import GELU, FastPath, note_in_graph
from left_trainer.kernels.fused_modules import Fused, use_fused_modules


class FusedNewGELU(NewGELUActivation, Fused):
    r"""$\frac{x}{2} (1 + \tanh(\sqrt{2 / \pi} (x + 0.044715 x^3)))$ as torch computes it.

    Transformers' class, the activation of T5 v1.1, mT5 and GPT-2, takes eight operations and keeps five tensors of the
    input's size for the backward pass (transformers 5.23); torch's keeps the input alone.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Any shape; the same comes back."""
        if torch.compiler.is_compiling():
            note_in_graph(GELU, None)
        else:
            self.fast_path.record(None)
        return nn.functional.gelu(input, approximate="tanh")


def use_fused_gelu(model: nn.Module, use: bool) -> FastPath:
    """Put it in the place of transformers' class in `model`, or take it out again."""

    def fused_class(module: nn.Module, plain: type[nn.Module]) -> type[Any] | None:
        return FusedNewGELU if plain is NewGELUActivation else None

    return use_fused_modules(model, fused_class, "use_fused_gelu", use)
