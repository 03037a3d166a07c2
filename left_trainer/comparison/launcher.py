"""What starts the processes of a cell: `python`, or a command that stands in its place."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from left_trainer.processes import alone


def check_launcher(value: Any) -> str:
    """The command that starts the processes of a run. Raises `ValueError` where it is none."""
    try:
        words = shlex.split(value) if isinstance(value, str) else []
    except ValueError:
        words = []
    if not words or shutil.which(words[0], path=search_path(os.environ)) is None:
        raise ValueError(
            f"launcher={value!r} must be a command that stands in the place of python and is on the PATH, such as "
            "'accelerate launch --config_file fsdp2.yaml' or 'torchrun --nproc_per_node 2'. Each run follows it as "
            "-m left_trainer.comparison.cell FOLDER."
        )
    return str(value)


def program(launcher: str | None) -> list[str]:
    """The words before `-m`."""
    return shlex.split(launcher) if launcher else [sys.executable]


def search_path(environment: Mapping[str, str]) -> str:
    """`PATH` after the folder of this interpreter, where `accelerate` and `torchrun` are, activated or not."""
    return os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])


def of_runs() -> dict[str, str]:
    """The environment of the processes of runs, however this one was started."""
    return {**alone(os.environ), "PATH": search_path(os.environ)}
