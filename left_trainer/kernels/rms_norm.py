"""RMSNorm that keeps its input, and nothing else of its size, for the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import is_torch_version
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from left_trainer.kernels.fast_paths import RMS_NORM, FastPath
from left_trainer.kernels.fused_modules import fused_version, of_same_code, plain_class, use_fused_modules

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# From here on, torch has kernels for it on GPUs; before, it composed the norm of operations that keep more.
HAS_CUDA_KERNELS = is_torch_version(">=", "2.9")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
        wide = x.float()
        norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.dtype = dtype
        normal = (wide * scale).to(dtype)
        return normal.mul_(weight) if torch.promote_types(dtype, weight.dtype) == dtype else normal * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        wants_x, wants_weight, *_ = ctx.needs_input_grad
        wide = x.float()
        dx = dweight = None
        if wants_weight:
            normal = (wide * scale).to(ctx.dtype)
            dweight = (gradient * normal).flatten(0, -2).sum(0).to(weight.dtype)
        if wants_x:
            inner = (gradient * weight).to(ctx.dtype).float()
            mean = torch.linalg.vecdot(inner, wide).unsqueeze(-1).div_(x.shape[-1]).mul_(scale.pow(3))
            dx = inner.mul_(scale).addcmul_(wide, mean, value=-1).to(x.dtype)
        return dx, dweight, None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    r"""$y = w \, x / \sqrt{\mathrm{mean}(x^2) + \epsilon}$ over the last dimension (Zhang and Sennrich, 2019).

    For the backward pass, $x$ and a number for each row are kept, where the operations of a model keep three tensors of
    the size of $x$ (transformers 5.23). On a GPU, torch's kernel keeps the same, and a trained weight the quotient.

    Args:
        x: `(..., n)`, of one of `DTYPES`. The norm is computed in float32.
        weight: `(n,)`.
        eps: Added to the mean.
        dtype: That $x$ has, once it is divided, before it is multiplied by the weight.

    Returns:
        `(..., n)`, in the dtype to which `dtype` and that of the weight are promoted.
    """
    if _has_kernel(x, dtype):
        with torch.autocast(x.device.type, enabled=False):  # which would keep x in float32
            return functional.rms_norm(x, x.shape[-1:], eps=eps).to(dtype) * weight
    result: torch.Tensor = _RMSNorm.apply(x, weight, eps, dtype)
    return result


def _has_kernel(x: torch.Tensor, dtype: torch.dtype) -> bool:
    return HAS_CUDA_KERNELS and x.is_cuda and x.dtype in (dtype, torch.float32)


def _llama(module: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, module.weight, module.variance_epsilon, x.dtype)


def _t5(module: Any, x: torch.Tensor) -> torch.Tensor:
    is_half = module.weight.dtype in (torch.float16, torch.bfloat16)
    return rms_norm(x, module.weight, module.variance_epsilon, module.weight.dtype if is_half else torch.float32)


def _olmo2(module: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, module.weight, module.variance_epsilon, torch.float32).to(x.dtype)


def _gemma(module: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, 1.0 + module.weight.float(), module.eps, torch.float32).type_as(x)


# The forward pass of a class, and what computes the same. Models copy these classes under names of their own.
FUSED: dict[type[nn.Module], Callable[[Any, torch.Tensor], torch.Tensor]] = {
    LlamaRMSNorm: _llama,
    T5LayerNorm: _t5,
    Olmo2RMSNorm: _olmo2,
    GemmaRMSNorm: _gemma,
}


def use_fused_rms_norm(model: nn.Module, use: bool) -> FastPath:
    """Put it in the place of the forward pass of the RMSNorms in `model`, or take it out again."""
    return use_fused_modules(model, lambda _, plain: _fused_class(plain), "use_fused_rms_norm", use)  # type: ignore[arg-type]


@functools.cache
def _fused_class(plain: type[Any]) -> type[Any] | None:
    """The class with the fused forward pass; `None` where the class computes something else."""
    compute = of_same_code(plain, FUSED, "forward", "_norm")
    if compute is None:
        return None

    def compute_or_not(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        reason = _why_not(self, hidden_states)
        self.fast_path.record(reason)
        return plain_class(self).forward(self, hidden_states) if reason else compute(self, hidden_states)

    return fused_version(plain, RMS_NORM, compute_or_not)


def _why_not(module: Any, x: torch.Tensor) -> str | None:
    if x.dtype not in DTYPES:
        return f"the input is in {str(x.dtype).removeprefix('torch.')}"
    if isinstance(module.weight, DTensor) or isinstance(x, DTensor):
        return "the weight is sharded"
    return None
