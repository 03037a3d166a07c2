"""The kernels that torch chooses on a device, called on shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional


def attention(
    device: torch.device,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` by the kernel that torch chooses on `device`; none of them keeps the scores.

    On a GPU that is flash attention for half precision without a mask, and otherwise the memory-efficient one, which
    takes the mask as a bias of the query's dtype with rows of a multiple of 16. On a CPU there is flash attention,
    and none with dropout.
    """
    ops = torch.ops.aten
    if device.type == "cpu":
        bias = _as_bias(query, attn_mask)
        if dropout_p or query.dim() != 4 or (bias is not None and bias.requires_grad):
            return _plain_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return ops._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=bias, scale=scale
        )[0]
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256:
        width = query.shape[-1]
        padded = [functional.pad(each, (0, -width % 8)) if width % 8 else each for each in (query, key, value)]
        return ops._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)[0][
            ..., :width
        ]
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    bias = _as_bias(query, attn_mask)
    if bias is not None:
        length = key.shape[-2]
        if length % 16:
            bias = functional.pad(bias, (0, -length % 16))[..., :length]
        bias = bias.expand(*query.shape[:-1], length)
    return ops._scaled_dot_product_efficient_attention(
        query, key, value, bias, query.requires_grad or key.requires_grad, dropout_p, is_causal, scale=scale
    )[0]


def _as_bias(query: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask of booleans as what is added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))


def _plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """The form with a matrix of scores."""
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, mask, dropout, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def dropout(
    device: torch.device, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """One kernel with a mask of bytes on a GPU; on a CPU the mask has the dtype of the input."""
    if device.type == "cpu" or not training or inplace or not 0 < p < 1:
        return torch.dropout(input, p, training)
    return torch.native_dropout(input, p, True)[0]


def rms_norm(
    device: torch.device,
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """One kernel that keeps its input on a GPU, as that of the layer norm does; several operations on a CPU."""
    if device.type == "cpu":
        return torch.rms_norm(input, normalized_shape, weight, eps)
    return torch.layer_norm(input, normalized_shape, weight)


REPLACED: Mapping[Any, Callable[..., Any]] = {
    functional.scaled_dot_product_attention: attention,
    functional.dropout: dropout,
    functional.rms_norm: rms_norm,
}
