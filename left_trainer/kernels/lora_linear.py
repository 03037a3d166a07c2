"""A frozen linear layer and its LoRA adapter in one autograd function."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# One product with the merged weight reads and writes it once more. Measured on a CPU it pays from here on.
MERGE_FROM_ROWS_PER_INPUT = 2
MERGEABLE = (torch.float32, torch.float64)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    *,
    compute_dtype: torch.dtype | None = None,
    quant_state: Any = None,
    product: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    r"""$y = x W^\top + b + s \, \mathrm{dropout}(x) A^\top B^\top$, and its gradients but for that of $W$.

    Beside the weights, the backward pass needs $x$ in `compute_dtype`, which layers with the same input share; the
    $r$-wide $x A^\top$; and a byte per input element where there is dropout. A frozen $A$ does without $x$. The
    adapter's part is added into the base's output and gradient in place.

    In float32 the forward pass takes the association order of fewer operations, as RunLoRA does
    (https://arxiv.org/abs/2312.03415): $x (W + s B A)^\top$ where rows are many. In lower precision the sum of the
    weights would round the adapter away.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`, frozen; with `quant_state`, bitsandbytes' packed form of it, unpacked in both passes.
        bias: `(out,)`.
        lora_a: `(r, in)`.
        lora_b: `(out, r)`.
        scaling: $s$.
        dropout: Probability that an element of the adapter's input is zero.
        compute_dtype: Of all products and of the result; `x.dtype` by default.
        quant_state: bitsandbytes' description of a 4-bit `weight`, or the scales of the rows of an 8-bit one, `(out,)`.
        product: Gives $x W^\top + b$ where the base layer does more than multiply by the unpacked weight, as in 8 bits.
    """
    cast = _cast(x, compute_dtype or x.dtype)
    layer = (weight, bias, lora_a, lora_b, scaling, dropout, quant_state, product)
    if torch.is_grad_enabled():
        y: torch.Tensor = _LoraLinear.apply(x, cast, *layer)
        return y
    return _forward(cast, *layer)[0]


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in `dtype`, without a gradient; layers that get the same tensor (q, k and v) share one cast."""
    if x.dtype == dtype or torch.compiler.is_compiling():
        return x.detach().to(dtype)
    version, cast = getattr(x, "_lora_linear_cast", (None, None))
    if version != x._version or cast is None or cast.dtype != dtype:
        cast = x.detach().to(dtype)
        x._lora_linear_cast = (x._version, cast)  # type: ignore[attr-defined]
    return cast


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    dropout: float,
    quant_state: Any,
    product: Callable[[torch.Tensor], torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The result, the narrow product unless it was not needed, and where dropout keeps an element."""
    dtype = x.dtype
    rows = x.reshape(-1, x.shape[-1])
    with _as_written(x):
        a, b = lora_a.to(dtype), lora_b.to(dtype)
        low, mask = None, None
        if product is not None:
            y, is_merged = _same_storage(product(x)), False
        else:
            base = unpacked(weight, quant_state, dtype)
            is_merged = not dropout and _merging_is_cheaper(rows, base)
            y = _affine(x, torch.addmm(base, b, a, alpha=scaling) if is_merged else base, bias)
        if not is_merged:
            flat = y.view(-1, y.shape[-1])
            dropped = rows
            if dropout:
                dropped, mask = (part.reshape(rows.shape) for part in torch.native_dropout(x, dropout, True))
            low = torch.mm(dropped, a.T)
            flat.addmm_(low, b.T, alpha=scaling)
    return y, low, mask


def _same_storage(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, but not as a view."""
    place = tensor.storage_offset(), tensor.size(), tensor.stride()
    return tensor.new_empty(0).set_(tensor.untyped_storage(), *place)


def _affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`(..., out)`, and not a view, because models may change the result in place."""
    y = x.new_empty(*x.shape[:-1], len(weight))
    flat, rows = y.view(-1, len(weight)), x.reshape(-1, x.shape[-1])
    if bias is None:
        torch.mm(rows, weight.T, out=flat)
    else:
        torch.addmm(bias.to(x.dtype), rows, weight.T, out=flat)
    return y


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cast: torch.Tensor, *layer: Any) -> torch.Tensor:
        weight, _, lora_a, lora_b, scaling, dropout, quant_state, _ = layer
        y, low, mask = _forward(cast, *layer)
        ctx.scaling, ctx.quant_state, ctx.x_dtype = scaling, quant_state, x.dtype
        ctx.keep = 1 / (1 - dropout) if dropout else 1.0
        needs_x = ctx.needs_input_grad[4] or low is None
        ctx.save_for_backward(cast if needs_x else None, mask, low, weight, lora_a, lora_b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cast, mask, low, weight, lora_a, lora_b = ctx.saved_tensors
        wants_x, _, _, wants_bias, wants_a, wants_b, *_ = ctx.needs_input_grad
        g = gradient.reshape(-1, gradient.shape[-1])
        rows = None if cast is None else cast.reshape(-1, cast.shape[-1])
        a, b = lora_a.to(g.dtype), lora_b.to(g.dtype)
        dx = da = db = None
        with _as_written(g):
            g_low = torch.mm(g, b) if wants_x or wants_a else None
            if g_low is not None and wants_x:
                dx = g @ unpacked(weight, ctx.quant_state, g.dtype)
                if mask is None:
                    dx.addmm_(g_low, a, alpha=ctx.scaling)
                else:
                    dx.addcmul_(g_low @ a, mask.to(g.dtype), value=ctx.scaling * ctx.keep)
                dx = dx.view(*gradient.shape[:-1], dx.shape[1]).to(ctx.x_dtype)
            if g_low is not None and wants_a and rows is not None:
                dropped = rows if mask is None else rows * mask
                da = torch.addmm(a, g_low.T, dropped, beta=0, alpha=ctx.scaling * ctx.keep).to(lora_a.dtype)
            if wants_b:
                low = low if rows is None or low is not None else rows @ a.T
                # The narrow factor on the left: measured on a CPU this takes half the time of g.T @ low.
                db = torch.addmm(b.T, low.T, g, beta=0, alpha=ctx.scaling).T.to(lora_b.dtype)
            dbias = g.sum(0) if wants_bias else None
        return dx, None, None, dbias, da, db, None, None, None, None


def _merging_is_cheaper(rows: torch.Tensor, base: torch.Tensor) -> bool:
    """Whether a product of the adapter's factors costs less than one of each row with the second of them.

    Compiled code does not ask, because it would be compiled for few rows and for many.
    """
    return not torch.compiler.is_compiling() and (
        rows.dtype in MERGEABLE
        and len(rows) >= MERGE_FROM_ROWS_PER_INPUT * base.shape[1]
        and torch.get_float32_matmul_precision() == "highest"
    )


def unpacked(weight: torch.Tensor, quant_state: Any, dtype: torch.dtype) -> torch.Tensor:
    """`(out, in)` in the dtype of the products."""
    if quant_state is None:
        return weight.to(dtype)
    if isinstance(quant_state, torch.Tensor):
        return weight.to(dtype).mul_(quant_state[:, None].mul(1 / 127))
    from bitsandbytes.functional import dequantize_4bit

    unpacked: torch.Tensor = dequantize_4bit(weight, quant_state)
    return unpacked.to(dtype)


def _as_written(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Have products of `x` and tensors of its dtype computed in that dtype."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) == x.dtype:
        return contextlib.nullcontext()  # entering autocast takes as long as launching a kernel or two
    return torch.autocast(device, enabled=False)
