"""What a run was planned to need, kept beside what it took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlannedRun:
    """The plan that a run began with.

    Args:
        rows: Of a micro-batch.
        source_tokens: Of its longest row.
        target_tokens: The same.
        peak_bytes: The most that tensors take in a step.
        peak_phase: When in a step that is.
        run_bytes: The most that the run needs of its device.
        device_bytes: That the device has, or on a CPU those that were free.
        device: Its name.
        step_seconds: Of a step on the longest rows; `None` where the device's speed is not known.
    """

    rows: int
    source_tokens: int
    target_tokens: int
    peak_bytes: int
    peak_phase: str
    run_bytes: int
    device_bytes: int
    device: str
    step_seconds: float | None = None
