"""DoRA of a frozen linear layer: the fused LoRA layer, whose outputs are scaled (Liu et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch

from left_trainer.kernels.lora_linear import unpacked


def scaled_outputs(
    product: torch.Tensor, bias: torch.Tensor | None, magnitude: torch.Tensor, norms: torch.Tensor
) -> torch.Tensor:
    r"""$y = \frac{m}{\lVert W + s B A \rVert} \odot x (W + s B A)^\top + b$; the norms are constants (section 4.3).

    Args:
        product: $x (W + s B A)^\top$, `(..., out)`: of `lora_linear` without its bias.
        bias: `(out,)`.
        magnitude: $m$, `(out,)`.
        norms: Of the rows of the merged weight, `(out,)`.
    """
    factor = magnitude / norms  # in its own dtype: a lower one would scale whole outputs wrongly
    if bias is None:
        return (product * factor).to(product.dtype)
    return torch.addcmul(bias.to(factor.dtype), product, factor).to(product.dtype)


@torch.no_grad()
def norms_of(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float, quant_state: Any
) -> torch.Tensor:
    """Norms of the rows of $W + s B A$, `(out,)`, without a gradient. Arguments as in `lora_linear`."""
    with torch.autocast(weight.device.type, enabled=False):
        merged = torch.addmm(unpacked(weight, quant_state, lora_a.dtype), lora_b, lora_a, alpha=scaling)
    return torch.linalg.vector_norm(merged, dim=1)
