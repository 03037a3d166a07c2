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
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor

from left_trainer.data.dataset_types import is_lazy
from left_trainer.methods import PeftMethod
from left_trainer.models import ModelSource, unwrapped, without_adapter
from left_trainer.storage.manifest import read_manifest
from left_trainer.training_args import LeftTrainingArguments

RUN = "run"
ROWS_LOOKED_AT = 4096
WEIGHTS_LOOKED_AT, VALUES_OF_A_WEIGHT = 64, 8
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
    """The run of `trainer`, as it is kept in its checkpoints; JSON. Taken before the first step: some configs change.

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


def check_identity(mine: Mapping[str, Any], checkpoint: str | Path) -> None:
    """Refuse a checkpoint of another run than `mine`, which may be a part of an identity.

    Checkpoints of earlier versions and of other trainers do not say what they belong to; they are not refused.

    Raises:
        ValueError: With the fields that differ and both values.
    """
    saved = (read_manifest(checkpoint) or {}).get(RUN) or {}
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
    """Digest of some values of weights that the checkpoint relies on and does not hold.

    Models of one shape, such as base and chat, differ in them. Layers with an adapter are left out, as several methods
    move a part of their weights into it. `None` where all are trained, or none in the memory of one process.
    """
    base = without_adapter(model)
    adapted = tuple(f"{name}." for name, module in base.named_modules() if isinstance(module, BaseTunerLayer))
    frozen = [
        weight.detach().flatten()
        for name, weight in base.named_parameters()
        if not (weight.requires_grad or weight.is_meta or isinstance(weight, DTensor) or name.startswith(adapted))
        and weight.is_floating_point()
        and weight.numel()
    ]
    some = [
        weight[:: max(1, len(weight) // VALUES_OF_A_WEIGHT)][:VALUES_OF_A_WEIGHT].to(torch.bfloat16).tolist()
        for weight in frozen[:: max(1, len(frozen) // WEIGHTS_LOOKED_AT)]
    ]
    return _digest(some) if some else None


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
