"""AdapterDrop: the lower layers of a model go without adapters (Rueckle et al., 2021, arXiv 2010.11918).

With a fixed number (*specialized*) these adapters are never made. With a range (*robust*) each forward pass in training
draws how many of the lower layers go without, so that one adapter serves at several sizes; `drop_lower_adapters` then
removes them for use. A model with an encoder and a decoder drops the lower layers of each.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

FIRST_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def layer_number(name: str) -> int | None:
    """Number, from 0, of the layer that a module's full name is in; `None` for a module outside of the layers."""
    found = FIRST_NUMBER.search(name)
    return int(found[1]) if found else None


class DroppedLayers:
    """How many of the lower layers go without an adapter in a forward pass.

    Args:
        fewest: In evaluation, and at least in training.
        most: At most in training.
    """

    def __init__(self, fewest: int, most: int) -> None:
        self.fewest, self.most = fewest, most
        self.number = fewest

    def draw(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before a forward pass of the whole model."""
        self.number = int(torch.randint(self.fewest, self.most + 1, ())) if module.training else self.fewest


def drop_lower_adapters(model: PeftModel, number: int) -> None:
    """Remove the adapters of the `number` lower layers, which the saved config then says.

    Args:
        model: Its active adapter is a bottleneck adapter.
        number: Of layers.

    Raises:
        ValueError: There are no more layers than that, or fewer than have been dropped already.
    """
    adapter, config = model.active_adapter, model.active_peft_config
    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    numbers = {name: layer_number(name) for name in layers}
    highest = max((each for each in numbers.values() if each is not None), default=0)
    if not config.fewest_dropped <= number <= highest:
        raise ValueError(
            f"number={number} must be from {config.fewest_dropped} to {highest}: layers that have an adapter, of which "
            "one has to stay."
        )
    for name, module in layers.items():
        where = numbers[name]
        if where is None or where >= number:
            continue
        del module.bottleneck_adapters[adapter]
        if not module.bottleneck_adapters and not module.bottleneck_invertible:
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, module.unload_and_optionally_merge_module(False, False, None))
    config.drop_layers = number
