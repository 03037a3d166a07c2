"""A method's hooks, bound to the model and options of one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from left_trainer.methods.apply import seeded
from left_trainer.methods.method import Batches, PeftMethod

# From the model, a micro-batch, and its share of the accumulated batch: what is added to the micro-batch's loss.
LossTerm: TypeAlias = Callable[[nn.Module, Mapping[str, Any], torch.Tensor | float], torch.Tensor]

PENALTY = "penalty"


class MethodHooks:
    """What a trainer asks of its method beyond the wrapped model.

    Args:
        method: The record; `None` for an explicit PEFT config without one, which has no hooks.
        peft_kwargs: The user's options; those of the hooks are taken from here.
        is_new: Whether the adapter was made for this run. One that came with the model is not initialised again.
    """

    def __init__(self, method: PeftMethod | None, peft_kwargs: Mapping[str, Any] | None, is_new: bool) -> None:
        self.method, self.is_new = method, is_new
        defaults = method.hook_options if method else {}
        self.options = {name: (peft_kwargs or {}).get(name, value) for name, value in defaults.items()}

    def prepare(self, model: nn.Module) -> None:
        """Change how the wrapped model computes, where PEFT's way does not fit."""
        if self.method and self.method.prepare:
            self.method.prepare(model)

    def callbacks(self, model: nn.Module) -> list[TrainerCallback]:
        """The method's own callback, if it has one."""
        callback = self.method.callback(model) if self.method and self.method.callback else None
        return [callback] if callback else []

    @property
    def changes_start(self) -> bool:
        """Whether `initialize` or `restore` is yet to set weights, or shapes, by those of the whole model."""
        return bool(self.method and (self.method.initialize or self.method.restore) and self.is_new)

    def initialize(self, model: nn.Module, batches: Batches, seed: int) -> bool:
        """Set the weights of a new adapter from the model or data, once. The random state is left as it was.

        Returns whether there was anything to set.
        """
        sets = bool(self.method and self.method.initialize and self.is_new)
        if self.method and self.method.initialize and self.is_new:
            with seeded(seed):
                self.method.initialize(model, batches, self.options)
        self.is_new = False
        return sets

    def restore(self, model: nn.Module, directory: str) -> None:
        """Give the model the shape that the adapter saved in `directory` has."""
        self.is_new = False
        if self.method and self.method.restore:
            self.method.restore(model, directory)

    def optimizer(
        self, model: nn.Module, args: TrainingArguments, chosen: tuple[type[torch.optim.Optimizer], dict[str, Any]]
    ) -> torch.optim.Optimizer | None:
        """The method's own optimizer; `None` where the trainer's is right."""
        if self.method is None or self.method.optimizer is None:
            return None
        optimizer_class, arguments = chosen
        arguments = {**arguments, "weight_decay": args.weight_decay}
        return self.method.optimizer(model, optimizer_class, arguments, self.options)

    def loss_terms(self) -> dict[str, LossTerm]:
        """What is added to the loss of each micro-batch, by the name it is logged under: the method's penalty."""
        penalty = self.method.penalty if self.method else None
        return {} if penalty is None else {PENALTY: lambda model, inputs, share: share * penalty(model)}
