"""Stopping a run whose loss or gradients are no longer finite."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from accelerate import Accelerator
from transformers import TrainerState

from left_trainer.training_args import LeftTrainingArguments


class TrainingDivergedError(ArithmeticError):
    """The loss or the gradients of a training step are not finite.

    Args:
        step: The optimizer step, counted from 1. It was not taken.
        learning_rate: Of that step.
        cause: What is not finite.
    """

    def __init__(self, step: int, learning_rate: float, cause: str) -> None:
        self.step, self.learning_rate = step, learning_rate
        super().__init__(
            f"Training diverged at step {step}: {cause}, at a learning rate of {learning_rate:g}. The step was not "
            f"taken, and earlier checkpoints stay. Lower learning_rate, for example to {learning_rate / 3:.1g}, or "
            "let it rise slowly with warmup_steps=0.1; with fp16=True, try bf16=True. stop_on_divergence=False trains "
            "on all the same."
        )


class DivergenceHost(Protocol):
    """What the check needs of the trainer."""

    args: LeftTrainingArguments
    accelerator: Accelerator
    state: TrainerState
    optimizer: torch.optim.Optimizer


class DivergenceCheck:
    """Looks at the loss of each micro-batch and at the gradient norm of each step.

    `Trainer` logs a loss that is not finite as the average of those before, or as 0, and goes on to the end
    (`logging_nan_inf_filter`).
    """

    def __init__(self) -> None:
        self._loss: torch.Tensor | None = None

    def see_loss(self, loss: torch.Tensor) -> None:
        """Add the loss of a micro-batch. Nothing is read from the device yet."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def check(self, trainer: DivergenceHost, gradient_norm: Any) -> None:
        """Before an optimizer step.

        Args:
            trainer: That takes the step.
            gradient_norm: Over all ranks, so that all of them stop.

        Raises:
            TrainingDivergedError: The loss or the norm is not finite, and `stop_on_divergence` is set. With float16
                the norm may be infinite: the scaler then leaves out the step and lowers its scale.
        """
        loss, self._loss = self._loss, None
        if not trainer.args.stop_on_divergence:
            return
        seen = {"the loss": loss}
        if trainer.accelerator.scaler is None:
            seen["the norm of the gradients"] = gradient_norm
        for name, value in seen.items():
            if value is not None and not torch.as_tensor(value).isfinite():
                cause = f"{name} is {float(value):g}"
                rate = float(trainer.optimizer.param_groups[0]["lr"])
                raise TrainingDivergedError(trainer.state.global_step + 1, rate, cause)
