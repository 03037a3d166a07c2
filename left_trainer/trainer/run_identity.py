"""What a checkpoint belongs to, so that a run goes on in itself and in nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor

from left_trainer.data.dataset_types import is_lazy
from left_trainer.methods import PeftMethod
from left_trainer.models import ModelSource, unwrapped, without_adapter
from left_trainer.storage.manifest import read_manifest
from left_trainer.training_args import LeftTrainingArguments

RUN = "run"
ROWS_LOOKED_AT = 64
VALUES_LOOKED_AT = 256
# What stands in the optimizer's saved state, from which it would come back whatever the new run says.
IN_OPTIMIZER = ("learning_rate", "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
ARGUMENTS = (*IN_OPTIMIZER, "lr_scheduler_type", "seed", "label_smoothing_factor", "bf16", "fp16")
# Where a model or a machine was, not what is trained.
NOT_OF_THE_METHOD = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")


class Identified(Protocol):
    """What a run is recognised by."""

    args: LeftTrainingArguments
    source: ModelSource
    method: PeftMethod | None
    model: Any
    train_dataset: Any


def identity(trainer: Identified) -> dict[str, Any]:
    """The run of `trainer`, as it is kept in its checkpoints; JSON.

    Length of the training, logging, evaluation, saving, workers and places may change between a kill and the
    continuation, and so may the number of processes while a step has as many rows.
    """
    args, model = trainer.args, unwrapped(trainer.model)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    found = {
        "peft_method": trainer.method.name if trainer.method else None,
        "peft_kwargs": _method_options(model),
        "model": trainer.source.config.model_type,
        "base weights": _base_weights(model),
        "trained weights": _weights(model),
        "training data": _data(trainer.train_dataset),
        "per_device_train_batch_size x gradient_accumulation_steps x processes": rows,
        **{name: getattr(args, name) for name in ARGUMENTS},
    }
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def check_identity(trainer: Identified, checkpoint: str | Path) -> None:
    """Refuse a checkpoint of another run.

    Checkpoints of earlier versions and of other trainers do not say what they belong to; they are not refused.

    Raises:
        ValueError: With the fields that differ and both values.
    """
    saved = (read_manifest(checkpoint) or {}).get(RUN)
    if saved is None:
        return
    mine = identity(trainer)
    differing = [name for name in mine if name in saved and saved[name] != mine[name]]
    if differing:
        described = "; ".join(_difference(name, saved[name], mine[name]) for name in differing)
        raise ValueError(
            f"{str(checkpoint)!r} belongs to another run, which cannot go on in this one: {described}. Set these as "
            "they were, or start a new run in another output_dir."
        )


def _difference(name: str, saved: Any, mine: Any) -> str:
    if isinstance(saved, dict) and isinstance(mine, dict):
        keys = [key for key in sorted({*saved, *mine}) if saved.get(key) != mine.get(key)]
        parts = [f"{key} was {saved.get(key)!r} and is {mine.get(key)!r}" for key in keys[:3]]
        return f"{name}: {', '.join(parts)}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    return f"{name} was {saved!r} and is {mine!r}"


def _method_options(model: nn.Module) -> dict[str, Any]:
    if not isinstance(model, PeftModel):
        return {}
    options = model.peft_config[model.active_adapters[0]].to_dict()
    return {name: _ordered(value) for name, value in options.items() if name not in NOT_OF_THE_METHOD}


def _ordered(value: Any) -> Any:
    """Sets in an order, for a file."""
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else value


def _weights(model: nn.Module) -> dict[str, Any]:
    """Number and digest of the names and shapes of all that is trained."""
    shapes = sorted((name, tuple(weight.shape)) for name, weight in model.named_parameters() if weight.requires_grad)
    return {"number": len(shapes), "digest": _digest(shapes)}


def _base_weights(model: nn.Module) -> str | None:
    """Digest of some values of the input embeddings: of models of one shape, such as base and chat, they differ.

    `None` where they are trained, or not in the memory of one process.
    """
    table = without_adapter(model).get_input_embeddings()
    weight = getattr(table, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.requires_grad or weight.is_meta or isinstance(weight, DTensor):
        return None
    values = weight.detach().flatten()
    some = values[:: max(1, len(values) // VALUES_LOOKED_AT)][:VALUES_LOOKED_AT]
    return _digest(some.to(torch.bfloat16).float().tolist()) if values.is_floating_point() else None


def _data(rows: Any) -> dict[str, Any] | None:
    """Number and digest of the rows; of a stream nothing, as reading it would take it from the training."""
    if rows is None or is_lazy(rows) or not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        return None
    number = len(rows)
    step = max(1, number // ROWS_LOOKED_AT)
    some = [_plain(rows[index]) for index in islice(range(0, number, step), ROWS_LOOKED_AT)]
    return {"rows": number, "digest": _digest(some)}


def _plain(row: Any) -> Any:
    if isinstance(row, Mapping):
        return {name: _plain(row[name]) for name in sorted(row)}
    return row.tolist() if hasattr(row, "tolist") else row


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=repr).encode()).hexdigest()[:16]
