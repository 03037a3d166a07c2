"""What a search for a learning rate gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Trial:
    """One training with one learning rate.

    Args:
        learning_rate: Tried.
        score: On the validation split; `None` where it is not a number.
        train_steps: Optimizer steps; `None` in files of version 0.1.
        train_seconds: Of these steps; `None` where they were not timed and in files of version 0.1.
    """

    learning_rate: float
    score: float | None
    train_steps: int | None = None
    train_seconds: float | None = None


@dataclass(frozen=True)
class TuningResult:
    """Several learning rates of one method on one task, of which the best was taken.

    Args:
        metric: What they were judged by, on the validation split.
        n_trials: Number of learning rates, those whose training failed included.
        trials: Those that finished.
        train_steps: Optimizer steps of all trials.
        train_seconds: Of these steps.
        n_widenings: Number of learning rates that were added, because the best was at the edge of those tried.
        edge: Where the best is among those tried, if it is at an edge all the same: a better one may lie beyond.
    """

    metric: str
    n_trials: int
    trials: tuple[Trial, ...]
    train_steps: int
    train_seconds: float
    n_widenings: int = 0
    edge: Literal["lowest", "highest"] | None = None
