"""What an engine is, and the engine of a name. Engines start attempts; what these do is in files alone."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from left_trainer.comparison.attempt import Attempt

ENGINES = ("local", "ray", "slurm")


class Pending(Protocol):
    """An attempt that an engine was given."""

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        ...

    def result(self) -> Any:
        """Nothing, or the error that ended it."""
        ...


class Engine(Protocol):
    """Starts attempts. What is pending when its context ends is stopped.

    Args:
        is_here: Whether attempts run on this machine.
        jobs: Attempts to have pending at most; `None` for all that are ready.
        tick_seconds: Between two looks at what is pending.
    """

    is_here: bool
    jobs: int | None
    tick_seconds: float

    def submit(self, attempt: Attempt) -> Pending:
        """Have an attempt run."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(self, *error: object) -> None: ...


def make_engine(name: str, jobs: int | None, options: Mapping[str, Any], output_dir: Path) -> Engine:
    """The engine of a name, checked.

    Args:
        name: One of `ENGINES`.
        jobs: Attempts at a time; by default one on this machine, and all that are ready on a cluster.
        options: Of the engine, by its own names.
        output_dir: Of the comparison.

    Raises:
        ImportError: Its package is not installed.
        ValueError: An option that it does not have, or no cluster.
    """
    module = importlib.import_module(f"left_trainer.comparison.engines.{name}_engine")
    return module.make(jobs, dict(options), output_dir)  # type: ignore[no-any-return]
