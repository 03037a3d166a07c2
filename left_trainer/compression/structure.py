"""The modules of a model as they are, so that parts which are removed from it can come back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# What a module keeps its parts in; the dictionaries stay the objects they are.
PARTS = ("_parameters", "_buffers", "_modules")


class Structure:
    """Remembers which modules, parameters and plain attributes a model has; the removed ones stay in memory.

    Values of tensors are not remembered: `values` gives them while the model is as it was, and `put_back` takes them.

    Args:
        model: With or without an adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._parts = [
            (module, {name: dict(vars(module)[name]) for name in PARTS}, _plain(vars(module)))
            for module in model.modules()
        ]
        configs = {id(config): config for module in model.modules() for config in _configs(module)}
        self._configs = [(config, dict(vars(config))) for config in configs.values()]

    def values(self) -> dict[str, torch.Tensor]:
        """The parameters and buffers of the model by name, not copied."""
        return {name: tensor.detach() for name, tensor in _named_tensors(self.model).items()}

    @torch.no_grad()
    def put_back(self, values: Mapping[str, torch.Tensor]) -> None:
        """Make the model what it was.

        Args:
            values: Its parameters and buffers by name, on any device.
        """
        for module, parts, plain in self._parts:
            for name, entries in parts.items():
                vars(module)[name].clear()
                vars(module)[name].update(entries)
            vars(module).update(plain)
        for config, attributes in self._configs:
            vars(config).update(attributes)
        for name, tensor in _named_tensors(self.model).items():
            tensor.grad = None
            tensor.data = values[name].to(tensor.device, copy=True)


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name not in PARTS and name != "training"}


def _configs(module: nn.Module) -> list[Any]:
    adapters = getattr(module, "peft_config", None)
    own = [getattr(module, name, None) for name in ("config", "generation_config")]
    return [
        config
        for config in (*own, *(adapters.values() if isinstance(adapters, dict) else ()))
        if config is not None and hasattr(config, "__dict__")
    ]


def _named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])
