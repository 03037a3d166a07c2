"""Give PEFT's LoRA layers the fused forward pass; everything else about them stays PEFT's."""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from left_trainer.kernels.dora_linear import norms_of, scaled_outputs
from left_trainer.kernels.fast_paths import LORA_LINEAR, FastPath, note_in_graph
from left_trainer.kernels.fused_modules import Fused, has_torch_hooks, plain_class, use_fused_modules
from left_trainer.kernels.lora_linear import lora_linear

# Why a layer is not fused.
HOOKED = "a part of the layer has hooks, as offloading and sharding put there"


def use_lora_linear(model: nn.Module, use: bool) -> FastPath:
    """Put the fused forward pass into the LoRA layers of `model`, or take it out again."""

    def fused_class(layer: nn.Module, plain: type[Any]) -> type[Any] | str | None:
        if not isinstance(layer, LoraLayer):
            return None
        if "forward" in layer.__dict__:
            return "the forward pass of the layer is replaced, as X-LoRA does"
        return _fused_class(plain) or f"{plain.__name__} is another kind of layer"

    return use_fused_modules(model, fused_class, "use_lora_linear", use)


def _fused_forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`(..., in)` to `(..., out)`."""
    plain = plain_class(self)
    lora_a = self.lora_A
    names = [name for name in self.active_adapters if name in lora_a]
    if self.disable_adapters or self.merged_adapters or not names:
        return plain.forward(self, x, *args, **kwargs)  # the base layer alone: there is nothing to fuse
    first = names[0]
    parts = (self.base_layer, lora_a[first], self.lora_B[first], self.lora_dropout[first])
    reason = "adapters chosen by row or position" if args or kwargs else _why_not_fused(self, x, names, *parts)
    if torch.compiler.is_compiling():
        note_in_graph(LORA_LINEAR, reason)
    else:
        self.fast_path.record(reason)
    if reason:
        return plain.forward(self, x, *args, **kwargs)
    base, lora_a, lora_b, dropout = parts
    weight, quant_state = _weight_of(base)
    factors = (lora_a.weight, lora_b.weight, self.scaling[first])
    is_dora = self.lora_variant.get(first) is not None
    result = lora_linear(
        x,
        weight,
        None if is_dora else base.bias,
        *factors,
        _active_dropout(dropout),
        compute_dtype=_compute_dtype(base, x),
        quant_state=quant_state,
        product=base if weight.dtype == torch.int8 else None,
    )
    if is_dora:
        magnitude = self.lora_magnitude_vector[first].weight
        result = scaled_outputs(result, base.bias, magnitude, norms_of(weight, *factors, quant_state))
    for name in names[1:]:
        part = self.lora_dropout[name](x.to(self.lora_A[name].weight.dtype))
        part = self.lora_B[name](self.lora_A[name](part)) * self.scaling[name]
        result = result + part.to(result.dtype)
    return result if quant_state is None else result.to(x.dtype)


def _weight_of(base: Any) -> tuple[torch.Tensor, Any]:
    """As `lora_linear` takes it, with what says how it is quantized."""
    if _is_8bit(base):
        return base.weight.data, base.weight.SCB if base.state.SCB is None else base.state.SCB
    weight = base.weight.T if type(base) is Conv1D else base.weight
    return weight, getattr(weight, "quant_state", None)


def _is_8bit(base: Any) -> bool:
    """Whether it is bitsandbytes' layer of 8-bit weights, which quantizes its input too."""
    return base.weight.dtype == torch.int8


def _active_dropout(dropout: nn.Module) -> float:
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


class FusedLinear(Linear, Fused):  # type: ignore[misc]
    """PEFT's LoRA of a linear layer, or of GPT-2's transposed one."""

    forward = _fused_forward


def _fused_class(plain: type[Any]) -> type[Any] | None:
    """The class that takes the place of `plain`, if there is one."""
    if plain is Linear:
        return FusedLinear
    is_quantized = plain.__module__ == "peft.tuners.lora.bnb" and plain.__name__ in ("Linear4bit", "Linear8bitLt")
    return _fused_quantized(plain.__name__) if is_quantized else None


@functools.cache
def _fused_quantized(name: str) -> type[Any]:
    """The same for one of PEFT's layers on a base that bitsandbytes has quantized."""
    from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt  # loads bitsandbytes

    plain = Linear4bit if name == "Linear4bit" else Linear8bitLt
    return type(f"Fused{name}", (plain, Fused), {"forward": _fused_forward, "__doc__": "FusedLinear, quantized."})


def _compute_dtype(base: nn.Module, x: torch.Tensor) -> torch.dtype:
    """Of the base layer's product."""
    given = base.__dict__.get("compute_dtype")  # bitsandbytes' layers have their own
    if given is not None:
        return given  # type: ignore[no-any-return]
    device = x.device.type
    is_cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else x.dtype


def _why_not_fused(layer: Any, x: torch.Tensor, names: list[str], *parts: Any) -> str | None:
    """The first reason that speaks against it for adapters `names`; `None` where the fused pass is exact.

    It is asked at every call of every layer, when a small model decodes mostly at this: hence no loop over attributes.
    """
    base, lora_a, lora_b, dropout = parts
    if has_torch_hooks(base) or has_torch_hooks(lora_a) or has_torch_hooks(lora_b) or has_torch_hooks(dropout):
        return HOOKED
    return _why_not_this_adapter(layer, names, lora_a, dropout) or _why_not_this_base(base, lora_a.weight, x)


def _why_not_this_adapter(layer: Any, names: list[str], lora_a: nn.Module, dropout: nn.Module) -> str | None:
    if layer.lora_variant:
        for name in names:
            variant = layer.lora_variant.get(name)
            if type(variant) is DoraLinearVariant:
                if len(names) > 1 or _active_dropout(dropout):
                    return "DoRA with dropout, or beside another adapter"
                if _is_8bit(layer.base_layer):
                    return "DoRA on a base in 8 bits"
                if has_torch_hooks(layer.lora_magnitude_vector[name]):
                    return HOOKED
            elif variant is not None:
                return f"{type(variant).__name__} computes another update"
    if layer.lora_bias[names[0]]:
        return "lora_bias=True"
    if type(lora_a) is not nn.Linear or type(dropout) not in (nn.Identity, nn.Dropout):
        return f"the adapter is made of {type(lora_a).__name__} and {type(dropout).__name__}"
    return None


def _why_not_this_base(base: Any, lora_a: torch.Tensor, x: torch.Tensor) -> str | None:
    weight = base.weight
    if weight.requires_grad:
        return "the base weight is trained"
    if type(weight) is not nn.Parameter and hasattr(weight, "quant_state"):
        return _why_not_this_4bit_base(base)
    if type(weight) is not nn.Parameter and hasattr(weight, "SCB"):
        return _why_not_this_8bit_base(base, x)
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"the base layer is a {type(base).__name__}"
    if isinstance(weight, DTensor) or isinstance(lora_a, DTensor) or weight.is_meta:
        return "the weights are sharded or offloaded"
    if type(weight) not in (nn.Parameter, torch.Tensor):
        return f"the base weight is a {type(weight).__name__}"
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return "the input has another dtype than the base weight"
    return None


def _why_not_this_8bit_base(base: Any, x: torch.Tensor) -> str | None:
    if not _is_8bit(base) or _weight_of(base)[1] is None:
        return "bitsandbytes has not quantized the layer yet"
    if torch.compiler.is_compiling():
        return "bitsandbytes' product in 8 bits is compiled"
    return "autocast changes the dtype of an 8-bit layer" if _compute_dtype(base, x) != x.dtype else None


def _why_not_this_4bit_base(base: Any) -> str | None:
    if base.weight.quant_state is None or not base.compute_type_is_set:
        return "bitsandbytes has not set up the layer yet"
    if getattr(base.weight.quant_state, "packing_format_for_cpu", False):
        return "bitsandbytes has packed the layer for inference on a CPU"
    return None if torch.is_grad_enabled() else "bitsandbytes has its own product for inference"
