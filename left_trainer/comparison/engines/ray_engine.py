"""Runs cells on a Ray cluster whose nodes see the comparison's folder."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from left_trainer.comparison.attempt import Attempt, handed_on

# A node that is lost takes its claim with it; the comparison tries again once that is silent.
DEFAULTS: dict[str, Any] = {"num_cpus": 1, "max_retries": 0}


class RayEngine:
    """An `Engine` whose attempts are tasks of Ray, with the resources that `options` name."""

    is_here, tick_seconds = False, 0.5

    def __init__(self, jobs: int | None, options: Mapping[str, Any]) -> None:
        import ray

        self.jobs, self._references = jobs, list[Any]()
        self._task = ray.remote(run).options(**options)

    def submit(self, attempt: Attempt) -> Future[None]:
        """Have a node run an attempt."""
        reference = self._task.remote(attempt, handed_on())
        self._references.append(reference)
        return reference.future()  # type: ignore[no-any-return]

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        for reference in self._references:
            ray.cancel(reference)


def run(attempt: Attempt, environment: Mapping[str, str]) -> None:
    """What a node does."""
    attempt.run(environment)


def make(jobs: int | None, options: dict[str, Any], output_dir: Path) -> RayEngine:
    """Join the cluster at the option `address`, that of `RAY_ADDRESS`, or one of this machine alone."""
    try:
        import ray
    except ImportError:
        raise ImportError("engine='ray' needs the package ray: pip install 'left_trainer[ray]'.") from None
    if not ray.is_initialized():
        ray.init(address=options.pop("address", None), log_to_driver=False, include_dashboard=False)
    gpus = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {}
    return RayEngine(jobs, {**DEFAULTS, **gpus, **options})
