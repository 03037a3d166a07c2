"""Figures of a run that the trainer does not have: the machine, the size of what was saved, the length of targets."""

from __future__ import annotations

import copy
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME

from left_trainer.adapters.files import TRAINING_STATE_FILE
from left_trainer.compression.sizes import counted_parameters
from left_trainer.data.lengths import target_counts
from left_trainer.models import without_adapter


def machine_name() -> str:
    """Processor, cores and GPU of this machine."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {device}"


def saved_bytes(folder: Path) -> int:
    """Bytes of the saved adapter, or of the whole model where all of it was trained."""
    names = (ADAPTER_SAFE_WEIGHTS_NAME, TRAINING_STATE_FILE)
    adapter = [folder / name for name in names if (folder / name).is_file()]
    files = adapter or list(folder.glob(f"{Path(SAFE_WEIGHTS_NAME).stem}*.safetensors"))
    return sum(file.stat().st_size for file in files)


def base_size(model: PreTrainedModel | PeftModel) -> tuple[int, int | None]:
    """The size of a model without what a method has added or wrapped: of one of the same class and config.

    Returns:
        Parameters apart from embeddings and head, and bytes of all weights as they are saved, tied ones once; `None`
        for the bytes of a quantized model.
    """
    base = without_adapter(model)
    with torch.device("meta"):
        plain = type(base)(copy.deepcopy(base.config))
    if getattr(base, "is_quantized", False):
        return counted_parameters(plain), None
    saved = plain.state_dict().keys()
    buffers = [buffer for name, buffer in plain.named_buffers() if name in saved]
    elements = sum(tensor.numel() for tensor in (*plain.parameters(), *buffers))
    return counted_parameters(plain), elements * base.dtype.itemsize


def target_tokens_per_row(dataset: Any) -> float | None:
    """Mean number of tokens that a row's loss is taken over; `None` for a dataset that is streamed or has no labels."""
    if not isinstance(dataset, Dataset) or "labels" not in dataset.column_names:
        return None
    return float(target_counts(dataset).mean())
