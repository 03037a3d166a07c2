"""How fast the steps alone are."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

WARMUP_STEPS = 2


def synchronize() -> None:
    """Wait until the accelerator, where there is one, has done what it was given: it works behind the clock's back."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class StepTimerCallback(TrainerCallback):
    """Time each optimizer step from its first batch to its update; evaluation, saving and logging stay outside.

    `train_runtime` of Hugging Face's trainers includes evaluations during training; this does not. Logs no keys.

    `callback.seconds` holds one duration per step. `callback.seconds_per_step` is their mean without the first
    `WARMUP_STEPS`, `None` before there are any.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    @property
    def seconds_per_step(self) -> float | None:
        timed = self.seconds[WARMUP_STEPS:] or self.seconds
        return statistics.fmean(timed) if timed else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier training."""
        self.seconds = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        synchronize()
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock."""
        synchronize()
        self.seconds.append(time.perf_counter() - self._began)
