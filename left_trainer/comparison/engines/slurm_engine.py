"""Runs cells as jobs of SLURM, through submitit, on nodes that see the comparison's folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from left_trainer.comparison.attempt import Attempt

DEFAULTS: dict[str, Any] = {"name": "left-trainer", "timeout_min": 240}
JOBS_FOLDER = "slurm"  # of scripts and logs, below the comparison's


class SlurmEngine:
    """An `Engine` whose attempts are jobs, each with the resources that the executor of submitit asks for."""

    is_here, tick_seconds = False, 1.0

    def __init__(self, jobs: int | None, executor: Any) -> None:
        self.jobs, self._executor, self._submitted = jobs, executor, list[Any]()

    def submit(self, attempt: Attempt) -> Any:
        """Queue an attempt."""
        job = self._executor.submit(attempt.run)
        self._submitted.append(job)
        return job

    def __enter__(self) -> SlurmEngine:
        return self

    def __exit__(self, *error: object) -> None:
        for job in self._submitted:
            if not job.done():
                job.cancel(check=False)


def make(jobs: int | None, options: dict[str, Any], output_dir: Path) -> SlurmEngine:
    """Raise `ValueError` where there is no SLURM, or an option that submitit does not have.

    The option `cluster` is `slurm` by default; submitit's `local` runs the jobs on this machine.
    """
    # Its own setting would close the log files of whatever program imports it.
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
    try:
        import submitit
    except ImportError:
        raise ImportError("engine='slurm' needs the package submitit: pip install 'left_trainer[slurm]'.") from None
    try:
        executor = submitit.AutoExecutor(output_dir / JOBS_FOLDER, cluster=options.pop("cluster", "slurm"))
        executor.update_parameters(**{**DEFAULTS, **options})
    except (RuntimeError, NameError, AssertionError) as error:
        raise ValueError(f"engine='slurm' with engine_options={options!r} cannot be used: {error}") from error
    return SlurmEngine(jobs, executor)
