"""What the losses at an output head share: numbers, logits in place, and the gradients of a head's three inputs."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

# exp(-60) times a vocabulary is less than float32 resolves beside 1. Below exp(-87) begin the denormal numbers, which
# slow a CPU's matrix product down tenfold.
SMALLEST_EXPONENT = {torch.float32: -60.0, torch.float64: -600.0}
LOW_PRECISION = (torch.bfloat16, torch.float16)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which softmax and sums are computed for products in `dtype`."""
    return torch.float32 if dtype in LOW_PRECISION else dtype


def in_product_dtype(hidden: torch.Tensor) -> torch.Tensor:
    """The input of a head in the dtype of its product: autocast's, where that is on."""
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


def finish_logits(
    logits: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, slopes: torch.Tensor | None = None
) -> torch.Tensor:
    r"""Turn the product of a head, `(rows, words)`, into its logits in place.

    Args:
        logits: Overwritten, and returned.
        bias: `(words,)`.
        softcap: $c$ of $c \tanh(z / c)$.
        slopes: Filled with the slopes of that, $1 - \tanh^2$, where they are wanted.
    """
    if bias is not None:
        logits.add_(bias)
    if softcap:
        logits.div_(softcap).tanh_()
        if slopes is not None:
            torch.mul(logits, logits, out=slopes).neg_().add_(1)
        logits.mul_(softcap)
    return logits


class HeadGradients:
    """Gradients of a head's input, weight and bias, summed up over tiles of rows.

    Args:
        hidden: `(rows, width)`, in the dtype of the products.
        weight: `(vocabulary, width)`.
        bias: `(vocabulary,)`.
        wanted: Which of the three.
    """

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wanted: Sequence[bool]
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.of_hidden = torch.empty_like(hidden) if wanted[0] else None
        self.of_weight = torch.zeros_like(weight, dtype=hidden.dtype) if wanted[1] else None
        self.of_bias: torch.Tensor | None = None
        if bias is not None and wanted[2]:
            self.of_bias = torch.zeros_like(bias, dtype=sum_dtype(hidden.dtype))

    @functools.cached_property
    def product_weight(self) -> torch.Tensor:
        """The weight in the dtype of the products."""
        return self.weight.to(self.hidden.dtype)

    def add(self, rows: slice, factor: torch.Tensor) -> None:
        """Add what `factor`, the gradient of the logits of `rows` in the dtype of the products, makes of them."""
        if self.of_hidden is not None:
            torch.mm(factor, self.product_weight, out=self.of_hidden[rows])
        if self.of_weight is not None:
            self.of_weight.addmm_(factor.T, self.hidden[rows])

    def add_to_bias(self, factor: torch.Tensor) -> None:
        """The same for the bias; `factor` may be in a higher precision than the products."""
        if self.of_bias is not None:
            self.of_bias += factor.sum(0, dtype=self.of_bias.dtype)

    def finished(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Of input, weight and bias, each in the dtype of what it belongs to."""
        of_weight = None if self.of_weight is None else self.of_weight.to(self.weight.dtype)
        of_bias = None if self.bias is None or self.of_bias is None else self.of_bias.to(self.bias.dtype)
        return self.of_hidden, of_weight, of_bias
