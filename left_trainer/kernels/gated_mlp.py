"""The product of a gated MLP that keeps its two factors, and not the activation of the gate."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from left_trainer.kernels.fast_paths import GATED_MLP, FastPath
from left_trainer.kernels.fused_modules import (
    fused_version,
    has_torch_hooks,
    of_same_code,
    use_fused_modules,
)
from left_trainer.kernels.gelu import FusedNewGELU


@dataclass(frozen=True)
class Activation:
    """A function of a gate, and what gives the gate's gradient from that of the function's value."""

    function: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


SILU = Activation(functional.silu, torch.ops.aten.silu_backward)
GELU = Activation(functional.gelu, torch.ops.aten.gelu_backward)
TANH_GELU = Activation(
    functools.partial(functional.gelu, approximate="tanh"),
    functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
)
ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.SiLU: SILU,
    SiLUActivation: SILU,
    GELUActivation: GELU,
    GELUTanh: TANH_GELU,
    FusedNewGELU: TANH_GELU,
}


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation.function(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        wants_gate, wants_up, _ = ctx.needs_input_grad
        dup = ctx.activation.function(gate).mul_(gradient) if wants_up else None
        dgate = ctx.activation.backward(gradient * up, gate) if wants_gate else None
        return dgate, dup, None


def gated_product(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    r"""$\phi(g) \odot u$ (Shazeer, 2020), by the operations of a model and so to the last bit.

    For the backward pass, $g$ and $u$ are kept; $\phi(g)$ is computed again.

    Args:
        gate: $g$, of any shape.
        up: $u$, of the same shape and dtype.
        activation: $\phi$.
    """
    product: torch.Tensor = _GatedProduct.apply(gate, up, activation)
    return product


def _llama(module: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module.down_proj(_product(module, module.act_fn, module.gate_proj(x), module.up_proj(x)))
    return result


def _phi3(module: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
    result: torch.Tensor = module.down_proj(_product(module, module.activation_fn, gate, up))
    return result


def _t5(module: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = module.dropout(_product(module, module.act, module.wi_0(x), module.wi_1(x)))
    weight = module.wo.weight
    if isinstance(weight, torch.Tensor) and hidden.dtype != weight.dtype and weight.dtype != torch.int8:
        hidden = hidden.to(weight.dtype)
    result: torch.Tensor = module.wo(hidden)
    return result


# The forward pass of a class, and what computes the same. Models copy these classes under names of their own.
FUSED: dict[type[nn.Module], Callable[[Any, torch.Tensor], torch.Tensor]] = {
    LlamaMLP: _llama,
    Phi3MLP: _phi3,
    T5DenseGatedActDense: _t5,
}


def use_fused_gated_mlp(model: nn.Module, use: bool) -> FastPath:
    """Put it in the place of the forward pass of the gated MLPs in `model`, or take it out again."""
    return use_fused_modules(model, lambda _, plain: _fused_class(plain), "use_fused_gated_mlp", use)  # type: ignore[arg-type]


@functools.cache
def _fused_class(plain: type[Any]) -> type[Any] | None:
    """The class with the fused forward pass; `None` where the class computes something else."""
    compute = of_same_code(plain, FUSED, "forward")
    return compute and fused_version(plain, GATED_MLP, compute)


def _product(module: Any, act: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    is_in_python = inspect.ismethod(getattr(act, "act", None))  # of a GELU, which torch's then equals but for rounding
    activation = None if is_in_python else ACTIVATIONS.get(type(act))
    reason = _why_not(act, activation, gate, up)
    module.fast_path.record(reason)
    if reason or activation is None:
        return act(gate) * up  # type: ignore[no-any-return]
    if isinstance(act, FusedNewGELU):
        act.fast_path.record(None)
    return gated_product(gate, up, activation)


def _why_not(act: nn.Module, activation: Activation | None, gate: torch.Tensor, up: torch.Tensor) -> str | None:
    if activation is None:
        return f"the activation is {type(act).__name__}"
    if has_torch_hooks(act):
        return "the activation has hooks"
    if isinstance(gate, DTensor) or isinstance(up, DTensor):
        return "the activations are sharded"
    return None if gate.dtype == up.dtype and gate.shape == up.shape else "gate and input are of different kinds"
