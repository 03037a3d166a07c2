"""An optimizer that the user brings, as an object or as a class: whether it trains what is to be trained."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import nn

from left_trainer.methods import PeftMethod
from left_trainer.training_args import LeftTrainingArguments

Optimizers: TypeAlias = tuple[torch.optim.Optimizer | None, Any]
ClassAndArguments: TypeAlias = tuple[type[torch.optim.Optimizer], dict[str, Any]]


def class_and_arguments(given: ClassAndArguments | None, args: LeftTrainingArguments) -> ClassAndArguments | None:
    """What the user gave, with the learning rate of `args` where there is none among the arguments."""
    return given and (given[0], {"lr": args.learning_rate, **given[1]})


def check_optimizer(
    optimizers: Optimizers, given_class: ClassAndArguments | None, method: PeftMethod | None, makes_models: bool
) -> None:
    """Refuse an optimizer that something else excludes.

    Args:
        optimizers: The user's optimizer and scheduler.
        given_class: The user's `optimizer_cls_and_kwargs`.
        method: What will be trained.
        makes_models: Whether `model_init` makes the models.
    """
    optimizer, scheduler = optimizers
    if optimizer is not None and given_class is not None:
        raise ValueError("optimizers and optimizer_cls_and_kwargs each define the optimizer. Remove one of them.")
    if makes_models and (optimizer is not None or scheduler is not None):
        raise ValueError(
            "optimizers belongs to one model, and model_init makes a new one for each training. Pass "
            "optimizer_cls_and_kwargs=(torch.optim.AdamW, {'lr': ...}) instead."
        )
    if optimizer is not None and method is not None and method.optimizer is not None:
        raise ValueError(
            f"optimizers would replace the optimizer of peft_method={method.name!r}, which is what the method is. "
            "Remove it, choose a class with optimizer_cls_and_kwargs, or choose another method."
        )


def check_optimizer_trains(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise `ValueError` where `optimizer` holds nothing that is trained, or parameters that `model` does not have."""
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if held & trained and held <= {id(parameter) for parameter in model.parameters()}:
        return
    kind, rate = type(optimizer), optimizer.param_groups[0].get("lr")
    raise ValueError(
        f"optimizers holds {len(held & trained)} of the {len(trained)} parameters that are trained: it was made before "
        "the method added its own. Pass the class, and the optimizer is made of what is trained: "
        f"optimizer_cls_and_kwargs=({kind.__module__.partition('.')[0]}.optim.{kind.__name__}, {{'lr': {rate}}}). Or "
        "wrap the model first, model = apply_method(model, ...), and make the optimizer from the parameters of that."
    )
