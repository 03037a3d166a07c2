"""The bottleneck, the invertible coupling, and the tuner layers that place them."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import ACT2FN

from left_trainer.tuners.bottleneck.config import BottleneckConfig, PfeifferAdapterConfig
from left_trainer.tuners.bottleneck.lower_layers import DroppedLayers


def _initialize(down: nn.Linear, up: nn.Linear, init_weights: str) -> None:
    nn.init.zeros_(down.bias)
    nn.init.zeros_(up.bias)
    if init_weights == "zero":
        nn.init.kaiming_uniform_(down.weight, a=5**0.5)
        nn.init.zeros_(up.weight)
    else:
        for projection in (down, up):
            nn.init.trunc_normal_(projection.weight, std=0.01, a=-0.02, b=0.02)


class Bottleneck(nn.Module):
    r"""The change that an adapter makes, without its residual connection.

    $$A(z) = s\,W_\text{up}\,f(W_\text{down} z + b_\text{down}) + s\,b_\text{up}$$

    `z` and the result have the shape `(batch, sequence, hidden)`.
    """

    def __init__(self, hidden_size: int, config: BottleneckConfig) -> None:
        super().__init__()
        size = config.bottleneck_size or max(1, hidden_size // config.reduction_factor)
        self.down = nn.Linear(hidden_size, size)
        self.activation = ACT2FN[config.non_linearity]
        self.up = nn.Linear(size, hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.scaling = config.scaling
        _initialize(self.down, self.up, config.init_weights)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.up(self.activation(self.down(z))) * self.scaling)


class Coupling(nn.Module):
    r"""The invertible adapter of MAD-X (arXiv 2005.00052): NICE's additive coupling of the halves of the hidden units.

    $$y_1 = x_1 + F(x_2), \quad y_2 = x_2 + G(y_1)$$

    `x` and `y` have the shape `(batch, sequence, hidden)`; F and G are networks of one hidden layer.
    """

    def __init__(self, hidden_size: int, config: PfeifferAdapterConfig) -> None:
        super().__init__()
        self.first = hidden_size // 2
        second = hidden_size - self.first
        self.F = self._network(second, self.first, config)
        self.G = self._network(self.first, second, config)

    @staticmethod
    def _network(inputs: int, outputs: int, config: PfeifferAdapterConfig) -> nn.Sequential:
        size = max(1, inputs // config.invertible_reduction_factor)
        down, up = nn.Linear(inputs, size), nn.Linear(size, outputs)
        _initialize(down, up, config.init_weights)
        return nn.Sequential(down, ACT2FN[config.non_linearity], up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x1, x2 = x[..., : self.first], x[..., self.first :]
        y1 = x1 + self.F(x2)
        return torch.cat((y1, x2 + self.G(y1)), dim=-1)


class BottleneckLayer(nn.Module, BaseTunerLayer):
    r"""Adds the change of the active adapters to the output `h` of a sublayer, one after the other:

    $$h \leftarrow h + A(z)$$

    Subclasses say what `z` is, from `h` and the input `x` of the sublayer, all of shape `(batch, sequence, hidden)`.
    Dropout that the model applies to the output of a sublayer comes after the adapter.

    Args:
        base_layer: The module whose output is `h`.
        parent: The module that holds it.
        config: Options of the first adapter; `input_module` and `norm_module` hold for all.
    """

    active_adapters: list[str]
    base_layer: nn.Module
    bottleneck_adapters: nn.ModuleDict
    bottleneck_invertible: nn.ModuleDict
    adapter_layer_names = ("bottleneck_adapters", "bottleneck_invertible")

    def __init__(self, base_layer: nn.Module, parent: nn.Module, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_adapters = nn.ModuleDict()
        self.bottleneck_invertible = nn.ModuleDict()
        self.siblings = self._siblings(config)
        # In a tuple, as the parent is no part of this module.
        self._parent = (parent,)
        # By device, as the replicas of `nn.DataParallel` share this dict.
        self._inputs: dict[torch.device, Any] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._number: int | None = None
        self._dropped: dict[str, DroppedLayers] = {}
        if self.siblings[0]:
            module = parent.get_submodule(self.siblings[0])
            self._hooks["input"] = module.register_forward_pre_hook(self._keep_input)

    @staticmethod
    def _siblings(config: BottleneckConfig) -> tuple[str | None, str | None]:
        return getattr(config, "input_module", None), getattr(config, "norm_module", None)

    def update_layer(self, adapter_name: str, hidden_size: int, config: BottleneckConfig) -> None:
        if self._siblings(config) != self.siblings:
            raise ValueError(
                f"Adapter {adapter_name!r} has input_module, norm_module = {self._siblings(config)}, but the adapters "
                f"that the model has already use {self.siblings}. Pass the same for all adapters of a model."
            )
        self.bottleneck_adapters[adapter_name] = Bottleneck(hidden_size, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)  # type: ignore[operator]
        self.train(self.base_layer.training)

    def add_invertible(
        self, adapter_name: str, hidden_size: int, config: PfeifferAdapterConfig, block: nn.Module
    ) -> None:
        """Transform the first input of `block`, the layer that this module is part of."""
        if "block" not in self._hooks:
            self._hooks["block"] = block.register_forward_pre_hook(self._transform_input)
        self.bottleneck_invertible[adapter_name] = Coupling(hidden_size, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)  # type: ignore[operator]

    def drop_with(self, adapter_name: str, number: int | None, dropped: DroppedLayers) -> None:
        """Let the bottleneck of an adapter rest in passes in which this layer, `number` from 0, goes without."""
        self._number, self._dropped[adapter_name] = number, dropped

    def _rests(self, adapter_name: str) -> bool:
        dropped = self._dropped.get(adapter_name)
        return dropped is not None and self._number is not None and self._number < dropped.number

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        parameter = next(base_layer.parameters(), None)
        return (None, None) if parameter is None else (parameter.device, parameter.dtype)

    def _keep_input(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._inputs[args[0].device] = args[0]

    def _active(self, adapters: nn.ModuleDict, resting: bool = False) -> list[nn.Module]:
        """Those of the active adapters, but for those that rest where `resting` is set."""
        if self.disable_adapters:
            return []
        names = [name for name in self.active_adapters if name in adapters]
        return [adapters[name] for name in names if not (resting and self._rests(name))]

    def _call(self, adapter: nn.Module, z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return adapter(z.to(next(adapter.parameters()).dtype)).to(dtype)

    def _transform_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        for coupling in self._active(self.bottleneck_invertible):
            hidden = self._call(coupling, hidden, hidden.dtype)
        return (hidden, *args[1:])

    def adapter_input(self, output: torch.Tensor, sublayer_input: torch.Tensor) -> torch.Tensor:
        """What the bottleneck reads."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = self.base_layer(*args, **kwargs)
        sublayer_input = self._inputs.pop(output.device, None)
        if sublayer_input is None and self.siblings[0] and not self.disable_adapters:
            raise RuntimeError(
                f"input_module={self.siblings[0]!r} did not run before the target module, so its input is not known. "
                "Name a module that runs before it, on the same device."
            )
        for adapter in self._active(self.bottleneck_adapters, resting=True):
            output = output + self._call(adapter, self.adapter_input(output, sublayer_input), output.dtype)
        return output

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(
            "Bottleneck adapters hold a non-linear function, which no change of the base weights can express, so they "
            "cannot be merged. Keep the adapter beside the model, or call `unload()` to drop it."
        )

    def unmerge(self) -> None:
        self.merge()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, without the hooks of this one."""
        if merge:
            self.merge()
        for hook in self._hooks.values():
            hook.remove()
        return self.base_layer


class HoulsbyLayer(BottleneckLayer):
    r"""Reads the output of the sublayer: $z = h$. Houlsby et al. (2019), arXiv 1902.00751."""

    def adapter_input(self, output: torch.Tensor, sublayer_input: torch.Tensor) -> torch.Tensor:
        return output


class PfeifferLayer(BottleneckLayer):
    r"""Reads the sum that the sublayer ends in: $z = x + h$ in pre-LN, $z = \text{LN}(x + h)$ in post-LN models.

    Pfeiffer et al. (2020), arXiv 2005.00247. The layer norm is the model's own.
    """

    def adapter_input(self, output: torch.Tensor, sublayer_input: torch.Tensor) -> torch.Tensor:
        total = sublayer_input + output
        norm = self.siblings[1]
        return total if norm is None else self._parent[0].get_submodule(norm)(total)


class ParallelLayer(BottleneckLayer):
    r"""Reads the input of the sublayer: $z = x$. He et al. (2022), arXiv 2110.04366."""

    def adapter_input(self, output: torch.Tensor, sublayer_input: torch.Tensor) -> torch.Tensor:
        return sublayer_input
