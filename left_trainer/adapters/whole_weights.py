"""Weights that an engine has spread over the processes, whole for as long as they are saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def is_spread(weight: torch.Tensor) -> bool:
    """Whether this process holds a part of `weight` only: under FSDP2, or DeepSpeed ZeRO-3."""
    return isinstance(weight, DTensor) or hasattr(weight, "ds_id")


@contextlib.contextmanager
def whole_weights(model: nn.Module, weights: Iterable[nn.Parameter], is_main: bool) -> Iterator[None]:
    """Inside, `weights` of `model` are whole on the process that writes. All processes enter: they gather together.

    Args:
        model: That holds the weights.
        weights: Those that are read inside. Of FSDP2's there are copies in the memory of the CPU, one after the other.
        is_main: Whether this process writes.
    """
    spread = list(filter(is_spread, weights))
    if any(hasattr(weight, "ds_id") for weight in spread):
        from deepspeed import zero

        with zero.GatheredParameters(spread):
            yield
        return
    copies = {weight: _gathered(weight, is_main) for weight in spread}
    places = [
        (module, name, weight)
        for module in (model.modules() if copies else ())
        for name, weight in module.named_parameters(recurse=False)
        if copies.get(weight) is not None
    ]
    for module, name, weight in places:
        module.register_parameter(name, copies[weight])
    try:
        yield
    finally:
        for module, name, weight in places:
            module.register_parameter(name, weight)


def _gathered(weight: nn.Parameter, is_main: bool) -> nn.Parameter | None:
    whole = weight.detach().full_tensor()  # type: ignore[attr-defined]
    return nn.Parameter(whole.cpu(), requires_grad=weight.requires_grad) if is_main else None
