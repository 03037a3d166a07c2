"""What training goes on from beyond the adapter's own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel

TRAINED = "trained"  # the part of a state with parameters of the model


@dataclass(frozen=True)
class TrainingState:
    """What PEFT's adapter file leaves out and training needs to go on, as named tensors.

    Args:
        collect: The tensors of the active adapter; none where the adapter file holds everything.
        restore: Puts such tensors into the active adapter of a model with the same method and base.
    """

    collect: Callable[[PeftModel], dict[str, torch.Tensor]]
    restore: Callable[[PeftModel, Mapping[str, torch.Tensor]], None]


def prefixed(part: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` with the names that they have in a state as its part called `part`."""
    return {f"{part}.{name}": tensor for name, tensor in tensors.items()}


def part_of(state: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """The part of `state` called `part`, with the names that its tensors had before `prefixed`."""
    return {name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if name.startswith(f"{part}.")}


def collect_trained_parameters(model: PeftModel) -> dict[str, torch.Tensor]:
    """Every parameter that is trained."""
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return prefixed(TRAINED, trained)


@torch.no_grad()
def restore_trained_parameters(model: PeftModel, state: Mapping[str, torch.Tensor]) -> None:
    """Put back what `collect_trained_parameters` gave."""
    parameters = dict(model.named_parameters())
    for name, tensor in part_of(state, TRAINED).items():
        parameters[name].copy_(tensor)


TRAINED_PARAMETERS = TrainingState(collect_trained_parameters, restore_trained_parameters)
