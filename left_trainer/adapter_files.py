"""Writing adapters so that a kill leaves whole files, with everything that training needs to go on."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

TRAINING_STATE_FILE = "adapter_training_state.safetensors"


def training_only_state(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """What the active adapter trains but its inference file leaves out; empty for most methods.

    PEFT saves of a prompt encoder only the prompts that it computes. P-tuning's MLP and a prefix projection are
    needed to train on, and without them resume and best-model restore put computed prompts where the encoder's own
    input belongs.
    """
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return {}
    state = model.prompt_encoder[model.active_adapter].state_dict()
    return {} if set(state) == {"embedding.weight"} else state


def save_training_only_state(model: PreTrainedModel | PeftModel, directory: str | Path) -> None:
    """Write the sidecar of `training_only_state` into `directory`; nothing where it is empty."""
    state = training_only_state(model)
    if state:
        path = Path(directory) / TRAINING_STATE_FILE
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, beside)
        beside.replace(path)


def load_training_only_state(model: PreTrainedModel | PeftModel, directory: str | Path) -> None:
    """Restore the sidecar from `directory` into the active adapter.

    Raises:
        FileNotFoundError: The method needs a sidecar and the directory has none, so training cannot go on from it.
    """
    if not training_only_state(model):
        return
    path = Path(directory) / TRAINING_STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} has no {TRAINING_STATE_FILE}. {model.active_peft_config.peft_type.value} cannot be restored "
            "for training without it: PEFT saves only the computed prompts, not the encoder that computes them. "
            "Continue from a checkpoint written by LeftTrainer or with AdapterSaverCallback."
        )
    model.prompt_encoder[model.active_adapter].load_state_dict(load_file(path))


def save_adapter(model: PeftModel, directory: str | Path, notes: Mapping[str, str] | None = None) -> Path:
    """Save the active adapter, safetensors only, with its sidecar, so that `directory` is whole or absent.

    The files are written into a hidden directory beside it, flushed, and renamed into place; an existing `directory`
    is replaced. `PeftModel.from_pretrained(base, directory)` loads it.

    Args:
        model: Its active adapter is saved.
        directory: Where.
        notes: Further text files by name.
    """
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    old = target.parent / f".{target.name}.{uuid.uuid4().hex}.old"
    try:
        model.save_pretrained(beside, safe_serialization=True, selected_adapters=[model.active_adapter])
        save_training_only_state(model, beside)
        for name, text in (notes or {}).items():
            (beside / name).write_text(text, encoding="utf-8")
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
    return target
