"""Writing the files of an adapter so that a kill leaves whole ones."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TRAINING_STATE_FILE = "adapter_training_state.safetensors"


def write_training_state(state: Mapping[str, torch.Tensor], directory: str | Path) -> None:
    """Write the sidecar into `directory`, whole or not at all; nothing where `state` is empty."""
    if state:
        path = Path(directory) / TRAINING_STATE_FILE
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, beside)
        beside.replace(path)


def read_training_state(directory: str | Path) -> dict[str, torch.Tensor] | None:
    """What the sidecar in `directory` holds; `None` where there is none."""
    path = Path(directory) / TRAINING_STATE_FILE
    return load_file(path) if path.is_file() else None


@contextlib.contextmanager
def whole_directory(directory: str | Path) -> Iterator[Path]:
    """A folder to write into, which becomes `directory` at the end: that is whole or absent.

    The folder is a hidden one beside `directory`. Its files are flushed and it is renamed into place; an existing
    `directory` is replaced, or left as it was when an error is raised inside.
    """
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    old = target.parent / f".{target.name}.{uuid.uuid4().hex}.old"
    try:
        yield beside
        for path in beside.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if target.exists():
            target.rename(old)
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
