"""Cross-entropy of rows of logits with its gradient in their place: one kernel for GPUs, in Triton.

PyTorch operations would pass over the logits some ten times, which on a GPU takes longer than the products around them.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

BLOCK_WORDS = 4096
WARPS = 8


def has_kernel(tensor: torch.Tensor) -> bool:
    """Whether `cross_entropy_rows` takes logits on the device and in the dtype of `tensor`."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and has_triton()


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed, as it is with PyTorch for CUDA and ROCm on Linux."""
    return importlib.util.find_spec("triton") is not None


@torch.library.custom_op("left_trainer::cross_entropy_rows", mutates_args=("logits",), device_types="cuda")
def cross_entropy_rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    label_smoothing: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Losses of rows of logits, which are overwritten by the gradient of their sum.

    With $z_j = c \tanh((x_j + b_j) / c)$, or $x_j + b_j$ without a softcap, and smoothing $\varepsilon$ over $V$ words,

    $$\ell = \log \sum_j e^{z_j} - (1 - \varepsilon) z_y - \frac{\varepsilon}{V} \sum_j z_j .$$

    At the target, $1 - p_y$ is the sum of the other probabilities and not a difference of nearly equal numbers.

    Args:
        logits: $x$, `(rows, vocabulary)`, contiguous, in float32, bfloat16 or float16.
        targets: $y$, `(rows,)`.
        bias: $b$, `(vocabulary,)`.
        softcap: $c$.
        label_smoothing: $\varepsilon$.
        with_gradient: Whether $\partial \ell / \partial x$ takes the place of the logits; else they stay.

    Returns:
        The losses in float32, and whether the target has the largest logit, both `(rows,)`.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    is_correct = torch.empty(len(logits), dtype=torch.bool, device=logits.device)
    with torch.cuda.device(logits.device):
        launch(logits, targets, bias, losses, is_correct, softcap, label_smoothing, with_gradient)
    return losses, is_correct


@cross_entropy_rows.register_fake
def _(
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    label_smoothing: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = logits.shape[:1]
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.bool)


def launch(
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    losses: torch.Tensor,
    is_correct: torch.Tensor,
    softcap: float | None,
    label_smoothing: float,
    with_gradient: bool,
) -> None:
    """Run the kernel, one program for each row. Arguments as in `cross_entropy_rows`, with room for what it returns."""
    rows, words = logits.shape
    _kernel()[(rows,)](
        logits,
        targets,
        logits if bias is None else bias,
        losses,
        is_correct,
        words,
        softcap or 0.0,
        label_smoothing,
        has_bias=bias is not None,
        has_softcap=bool(softcap),
        has_smoothing=bool(label_smoothing),
        with_gradient=with_gradient,
        block=BLOCK_WORDS,
        num_warps=WARPS,
    )


@functools.cache
def _kernel() -> Any:
    """The kernel, made at its first use: a machine without a GPU may lack Triton."""
    from left_trainer.kernels.cross_entropy_rows_triton import cross_entropy_rows_kernel

    return cross_entropy_rows_kernel
