"""What a trainer has logged."""

from __future__ import annotations

from typing import Any


def losses(trainer: Any) -> list[float]:
    """The logged training losses, in order."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def gradient_norms(trainer: Any) -> list[float]:
    """The logged gradient norms, in order."""
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
