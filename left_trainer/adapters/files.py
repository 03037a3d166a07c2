"""Writing the files of an adapter so that a kill leaves whole ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from left_trainer.storage.whole import whole_file

TRAINING_STATE_FILE = "adapter_training_state.safetensors"


def write_training_state(state: Mapping[str, torch.Tensor], directory: str | Path) -> None:
    """Write the sidecar into `directory`, whole or not at all; nothing where `state` is empty."""
    if state:
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        with whole_file(Path(directory) / TRAINING_STATE_FILE, size) as part:
            save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, part)


def read_training_state(directory: str | Path) -> dict[str, torch.Tensor] | None:
    """What the sidecar in `directory` holds; `None` where there is none."""
    path = Path(directory) / TRAINING_STATE_FILE
    return load_file(path) if path.is_file() else None
