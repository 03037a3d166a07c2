"""The state of an optimizer, cut along with its parameters."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

import torch

# Adafactor's factors of the second moment: means over the last axis, and over the last but one.
FACTORS = {"exp_avg_sq_row": -1, "exp_avg_sq_col": -2}


def check_optimizer(optimizer: torch.optim.Optimizer, parameters: Collection[torch.Tensor]) -> None:
    """Raise `ValueError` where the state of one of `parameters` cannot be cut along with it."""
    for parameter in parameters:
        for name, value in optimizer.state.get(parameter, {}).items():
            if not _is_known(name, value, parameter):
                raise ValueError(
                    f"shrink_to cannot cut the state {name!r} of {type(optimizer).__name__}: its entries do not belong "
                    "to single parameters. Set optim='adamw_torch' or shrink_kwargs={'schedule': 'at_start'}."
                )


def cut_state(state: dict[str, Any], parameter: torch.Tensor, axis: int, index: torch.Tensor) -> None:
    """Keep of the state of `parameter` what `index` names along `axis`, in place.

    Args:
        state: Of `parameter` as it was before.
        parameter: As it is afterwards.
    """
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or not value.dim():
            continue
        averaged = FACTORS.get(name)
        position = axis
        if averaged is not None:
            averaged %= parameter.dim()
            if averaged == axis:
                continue
            position = axis - (axis > averaged)
        state[name] = value.index_select(position, index.to(value.device))


def forget(optimizer: torch.optim.Optimizer, parameters: Collection[torch.Tensor]) -> None:
    """Take `parameters` out of the groups and the state; a group may stay behind empty, as schedulers count them."""
    gone = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        stays = [id(parameter) not in gone for parameter in group["params"]]
        # LoRA-FA's groups have lists beside the parameters, with an entry for each.
        for key, entries in group.items():
            if isinstance(entries, list) and len(entries) == len(stays):
                group[key] = list(itertools.compress(entries, stays))
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def _is_known(name: str, value: Any, parameter: torch.Tensor) -> bool:
    if not isinstance(value, torch.Tensor):
        return value is None or isinstance(value, (bool, int, float))
    if name in FACTORS and value.dim() == parameter.dim() - 1:
        return True
    return not value.dim() or (value.shape == parameter.shape and value.is_floating_point())
