"""What a run has measured of its processes: memory and speed, of which each knows its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from accelerate.utils import gather_object

from left_trainer.callbacks.memory_profiler import MemoryProfilerCallback
from left_trainer.callbacks.step_timer import StepTimerCallback

Callback = TypeVar("Callback")


@dataclass(frozen=True)
class ProcessFigures:
    """Figures of one process; `None` where something was not measured.

    Args:
        train_peak_bytes: Most memory in use in training.
        step_peak_bytes: The same, less what was in use before it beside the weights.
        eval_peak_bytes: Most memory in use in evaluation.
        seconds_per_step: Of an optimizer step.
        generated_rows_per_second: Of the last evaluation that generated.
    """

    train_peak_bytes: int | None = None
    step_peak_bytes: int | None = None
    eval_peak_bytes: int | None = None
    seconds_per_step: float | None = None
    generated_rows_per_second: float | None = None


def figures_of_all(trainer: Any) -> tuple[ProcessFigures, ...]:
    """The figures of all processes, by their number. Each has to ask, at the end of a training or an evaluation."""
    profiler, timer = _callback(trainer, MemoryProfilerCallback), _callback(trainer, StepTimerCallback)
    summary = profiler.summary if profiler else None
    peak = summary.train_peak_bytes if summary else None
    own = ProcessFigures(
        train_peak_bytes=peak,
        step_peak_bytes=None if summary is None or peak is None else peak - summary.baseline_bytes,
        eval_peak_bytes=summary.eval_peak_bytes if summary else None,
        seconds_per_step=timer.seconds_per_step if timer else None,
        generated_rows_per_second=trainer.generation_speed.rows_per_second,
    )
    return tuple(gather_object([own]))


def _callback(trainer: Any, kind: type[Callback]) -> Callback | None:
    return next((item for item in trainer.callback_handler.callbacks if isinstance(item, kind)), None)
