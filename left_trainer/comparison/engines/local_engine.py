"""Runs cells on this machine, one or several at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from left_trainer.comparison.forked import ForkServer
from left_trainer.comparison.launcher import of_runs

if TYPE_CHECKING:
    from left_trainer.comparison.attempt import Attempt

FORK = "fork"  # option


class LocalEngine:
    """An `Engine` whose attempts are threads, each with a process of its own.

    Where several GPUs are visible, each has one of them, or its share of them if its cell has a launcher.

    Args:
        jobs: Attempts at a time.
        forks: Whether the processes are forked from one that has imported everything.
    """

    is_here, tick_seconds = True, 0.1

    def __init__(self, jobs: int, forks: bool = True) -> None:
        self.jobs = jobs
        self._fork_server = ForkServer({**of_runs(), **_share_of_cores(jobs)}, None if forks else f"{FORK}=False")
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
        self._fork_server.close()
        self._pool.shutdown(cancel_futures=True)

    def _run(self, attempt: Attempt) -> None:
        slot = self._slots.get()
        try:
            environment = environment_of(slot, self.jobs, attempt.cell.launcher is not None)
            attempt.run(environment, self._stopped, self._fork_server)
        finally:
            self._slots.put(slot)


def make(jobs: int | None, options: Mapping[str, Any], output_dir: Path) -> LocalEngine:
    """Raise `ValueError` where an option is not its own: `fork`, true or false."""
    forks, *others = options.get(FORK, True), *(name for name in options if name != FORK)
    if others:
        raise ValueError(
            f"engine_options={dict(options)!r}: the local engine has the option {FORK} alone. Others are those of a "
            "cluster: pass --engine ray or --engine slurm."
        )
    if not isinstance(forks, bool):
        raise ValueError(f"engine_options: {FORK}={forks!r} must be true or false.")
    return LocalEngine(jobs or 1, forks)


def environment_of(slot: int, jobs: int, has_launcher: bool) -> dict[str, str]:
    """What a job sees of the machine: its share of the cores, and GPUs of its own where there are several."""
    import torch

    if not torch.cuda.is_available():
        return _share_of_cores(jobs)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    devices = visible if visible != [""] else [str(index) for index in range(torch.cuda.device_count())]
    share = max(1, len(devices) // jobs) if has_launcher else 1
    first = slot * share % len(devices)
    return {**_share_of_cores(jobs), "CUDA_VISIBLE_DEVICES": ",".join(devices[first : first + share])}


def _share_of_cores(jobs: int) -> dict[str, str]:
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
