"""How much memory a process or device uses now, and at most since a reset."""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

import psutil
import torch

SAMPLING_SECONDS = 0.005


class MemoryCounter(Protocol):
    """Memory of one device in bytes."""

    def current(self) -> int:
        """Bytes in use now."""

    def peak(self) -> int:
        """Most bytes in use since the last reset."""

    def reset_peak(self) -> None:
        """Forget the peak."""

    def close(self) -> None:
        """Stop measuring; may be called twice."""


class AllocatorCounter:
    """The counters that PyTorch's allocator keeps itself: exact (`torch.cuda`, `torch.xpu`)."""

    def __init__(self, module: Any, device: torch.device) -> None:
        self.module, self.device = module, device

    def current(self) -> int:
        """Bytes allocated now."""
        return int(self.module.memory_allocated(self.device))

    def peak(self) -> int:
        """Most bytes allocated since the last reset."""
        return int(self.module.max_memory_allocated(self.device))

    def reset_peak(self) -> None:
        """Forget the peak."""
        self.module.reset_peak_memory_stats(self.device)

    def close(self) -> None:
        """Nothing runs in between."""


class SampledCounter:
    """A figure that has no peak of its own, read by a thread every few milliseconds.

    Resident memory of the process on a CPU, `torch.mps.current_allocated_memory` on MPS. Peaks shorter than the
    sampling interval can be missed, and memory that the allocator keeps for reuse counts as in use.
    """

    def __init__(self, device_type: str) -> None:
        self._process = psutil.Process()
        self._read_mps = device_type == "mps"
        self._peak = 0
        self._stop = threading.Event()
        # The thread holds a weak reference, so that it ends with its counter when nobody closes it.
        arguments = (weakref.ref(self), self._stop)
        self._thread = threading.Thread(target=_sample, args=arguments, daemon=True, name="left-trainer-memory")
        self._thread.start()

    def current(self) -> int:
        """Bytes in use now."""
        return int(torch.mps.current_allocated_memory() if self._read_mps else self._process.memory_info().rss)

    def peak(self) -> int:
        """Most bytes seen since the last reset."""
        self.sample()
        return self._peak

    def reset_peak(self) -> None:
        """Forget the peak."""
        self._peak = self.current()

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        self._thread.join()

    def sample(self) -> None:
        """Take one reading."""
        self._peak = max(self._peak, self.current())


def _sample(reference: weakref.ref[SampledCounter], stop: threading.Event) -> None:
    while not stop.wait(SAMPLING_SECONDS):
        counter = reference()
        if counter is None:
            return
        counter.sample()
        del counter


def memory_counter(device: torch.device) -> MemoryCounter:
    """The best counter that `device` has."""
    if device.type in ("cuda", "xpu"):
        return AllocatorCounter(getattr(torch, device.type), device)
    return SampledCounter(device.type)
