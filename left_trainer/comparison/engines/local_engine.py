"""Runs cells on this machine, one or several at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from left_trainer.comparison.attempt import Attempt


class LocalEngine:
    """An `Engine` whose attempts are threads, each with a process of its own.

    Where several GPUs are visible, each has one of them, or its share of them if its cell has a launcher.
    """

    is_here, tick_seconds = True, 0.1

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(jobs):
            self._slots.put(slot)
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(jobs)

    def submit(self, attempt: Attempt) -> Future[None]:
        """Run an attempt as soon as one of the jobs is free."""
        return self._pool.submit(self._run, attempt)

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def _run(self, attempt: Attempt) -> None:
        slot = self._slots.get()
        try:
            attempt.run(environment_of(slot, self.jobs, attempt.cell.launcher is not None), self._stopped)
        finally:
            self._slots.put(slot)


def make(jobs: int | None, options: Mapping[str, Any], output_dir: Path) -> LocalEngine:
    """Raise `ValueError` where there are options: the engine has none."""
    if options:
        raise ValueError(
            f"engine_options={dict(options)!r} are those of a cluster. Pass --engine ray or --engine slurm."
        )
    return LocalEngine(jobs or 1)


def environment_of(slot: int, jobs: int, has_launcher: bool) -> dict[str, str]:
    """What a job sees of the machine: GPUs of its own where there are several, else its share of the cores."""
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        devices = visible if visible != [""] else [str(index) for index in range(torch.cuda.device_count())]
        share = max(1, len(devices) // jobs) if has_launcher else 1
        first = slot * share % len(devices)
        return {"CUDA_VISIBLE_DEVICES": ",".join(devices[first : first + share])}
    if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    return {}
