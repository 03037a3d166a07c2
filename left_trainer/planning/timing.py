"""How long a recorded step takes on a device: a roofline for each operation, and a queue between host and device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from left_trainer.planning.devices import Device
from left_trainer.recording.recorder import Operation

Bound = Literal["compute", "bandwidth", "launches"]

PRODUCTS = 0.55
"""Share of its peak that a GPU reaches in products of matrices of the sizes of language models."""
TRAFFIC = 0.8
"""Share of its bandwidth that a kernel reaches."""
KERNEL_SECONDS = 2e-6
"""The shortest kernel."""


@dataclass(frozen=True)
class StepTime:
    """The time of a step.

    Args:
        seconds: From its first launch to the end of its last kernel.
        host_seconds: That the host needs for its launches alone.
        bounds: Seconds of the device by what bounds its kernels.
        phases: Seconds by the phase of the step.
    """

    seconds: float
    host_seconds: float
    bounds: dict[Bound, float]
    phases: dict[str, float]

    @property
    def bound(self) -> Bound:
        """What the step waits for most."""
        if self.host_seconds > 0.9 * self.seconds:
            return "launches"
        return max(self.bounds, key=lambda bound: self.bounds[bound])


def step_time(operations: Iterable[Operation], device: Device) -> StepTime:
    """The time of the recorded operations on `device`.

    An operation takes the longer of its arithmetic and of its memory traffic (Williams et al., 2009, "Roofline"). The
    host runs ahead of the device and launches one operation after the other; where it waits for a result, both meet.

    Args:
        operations: In the order of their launch.
        device: With bandwidth and arithmetic.

    Raises:
        ValueError: Of the device only the memory is known.
    """
    if device.bandwidth is None:
        raise ValueError(f"Of {device.name} only the memory is known, so there is no estimate of time.")
    host = end = launching = 0.0
    bounds: dict[Bound, float] = defaultdict(float)
    phases: dict[str, float] = defaultdict(float)
    for operation in operations:
        before = max(host, end)
        host, launching = host + device.launch_seconds, launching + device.launch_seconds
        seconds, bound = kernel_seconds(operation, device)
        bounds[bound] += seconds
        end = max(end, host) + seconds
        if operation.is_synchronous or device.kernels == "cpu":
            host = end
        phases[operation.phase] += max(host, end) - before
    return StepTime(max(host, end), launching, dict(bounds), dict(phases))


def kernel_seconds(operation: Operation, device: Device) -> tuple[float, Bound]:
    """Seconds of an operation on `device`, and what bounds it."""
    assert device.bandwidth is not None
    reached, moved = (1.0, 1.0) if device.is_measured else (PRODUCTS, TRAFFIC)
    traffic = (operation.read_bytes + operation.written_bytes) / (moved * device.bandwidth)
    compute = operation.flops / (reached * device.peak_flops(_dtype(operation))) if operation.flops else 0.0
    if max(traffic, compute) < KERNEL_SECONDS:
        return KERNEL_SECONDS, "launches"
    return (compute, "compute") if compute > traffic else (traffic, "bandwidth")


def _dtype(operation: Operation) -> torch.dtype:
    """The dtype of a product: that of its floating-point inputs."""
    return next((each.dtype for each in operation.inputs if each.dtype.is_floating_point), torch.float32)
