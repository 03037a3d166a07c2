"""Walks over the modules of a model without torch's recursion.

In each step, `Trainer` walks over all modules some six times: to set their mode, to clip and to clear gradients, to
count operations. torch hands every module up through a generator for each level above it. A model with an adapter has
thousands of modules, and the GPU waits for each walk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from types import MethodType

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

# These do nothing more where the mode of all modules stays.
PLAIN_TRAIN = (nn.Module.train, PreTrainedModel.train, DistributedDataParallel.train)


@contextlib.contextmanager
def quick_walks(model: nn.Module, base: nn.Module) -> Iterator[None]:
    """Inside, `train`, `parameters` (and so `zero_grad`) of `model` and `num_parameters` of `base` take less time.

    They do the same. Parts of the two keep torch's methods.
    """
    model.train = MethodType(train, model)  # type: ignore[method-assign]
    model.parameters = MethodType(parameters, model)  # type: ignore[method-assign]
    base.num_parameters = MethodType(num_parameters, base)  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.train, model.parameters, base.num_parameters


def train(self: nn.Module, mode: bool = True) -> nn.Module:
    """As the method of its class, which is called only where it changes something."""
    for module in modules(self):
        if module.training is not mode or type(module).train not in PLAIN_TRAIN:
            return type(self).train(self, mode)  # type: ignore[no-any-return]
    return self


def parameters(self: nn.Module, recurse: bool = True) -> Iterator[nn.Parameter]:
    """As `torch.nn.Module.parameters`, in the same order."""
    return (parameter for _, _, parameter in _places(modules(self) if recurse else [self]))


def num_parameters(self: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """As `PreTrainedModel.num_parameters`."""
    if getattr(self, "is_loaded_in_4bit", False):  # numbers of two to a byte
        return type(self).num_parameters(self, only_trainable, exclude_embeddings)
    return sum(
        parameter.numel()
        for module, name, parameter in _places(modules(self))
        if (parameter.requires_grad or not only_trainable)
        and not (exclude_embeddings and name == "weight" and isinstance(module, nn.Embedding))
    )


def _places(among: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The module that has a parameter first, and its name there."""
    seen: set[nn.Parameter] = set()
    for module in among:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield module, name, parameter


def modules(self: nn.Module) -> Iterator[nn.Module]:
    """As `torch.nn.Module.modules`, in the same order."""
    seen: set[nn.Module] = set()
    waiting: list[nn.Module | None] = [self]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in seen:
            seen.add(module)
            yield module
            if module._modules:
                waiting.extend(reversed(module._modules.values()))
