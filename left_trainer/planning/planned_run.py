"""What a run was planned to need, kept beside what it took."""

from __future__ import annotations

from dataclasses import dataclass

from left_trainer.callbacks.tables import format_bytes


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

    def __str__(self) -> str:
        """What it needs, when, and what there is."""
        shape = f"{self.rows} row{'s' * (self.rows != 1)} of {self.source_tokens} + {self.target_tokens} tokens"
        time = f"; a step on rows of this length takes about {self.step_seconds:.2g} s" if self.step_seconds else ""
        return (
            f"needs {format_bytes(self.run_bytes)} of the {format_bytes(self.device_bytes)} of {self.device}, for "
            f"{shape}, most of it in the {self.peak_phase} phase of a step{time}"
        )
