"""What a checkpoint belongs to, so that a run goes on in itself and in nothing else.

A difference is refused where the run would read other rows, compute another loss, or make no sense of what was saved,
and where the saved state of the optimizer would beat the new argument without a word. What takes effect from the
checkpoint on may change: the length of the training, and with it the schedule; logging, evaluation and saving; places;
workers; the split of a step's rows over processes and accumulation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor

from left_trainer.compression.teacher_key import some_values
from left_trainer.compression.vocabulary import TrimmedVocabulary
from left_trainer.data.dataset_types import is_lazy
from left_trainer.methods import PeftMethod
from left_trainer.methods.hooks import MethodHooks
from left_trainer.models import ModelSource, unwrapped, without_adapter
from left_trainer.storage.manifest import read_manifest
from left_trainer.trainer.shrink_checks import loses_parts
from left_trainer.training_args import LeftTrainingArguments

RUN = "run"
ROWS, WRITTEN_ROWS = "training data", "training data with the teacher's targets"
ROWS_LOOKED_AT = 4096
WEIGHTS_LOOKED_AT = 64
# What stands in the optimizer's saved state, from which it would come back whatever the new run says.
IN_OPTIMIZER = ("learning_rate", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
OF_THE_ROWS = ("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last")
OF_THE_LOSS = (
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "max_grad_norm",
    "loss_type",
    "completion_only_loss",
    "assistant_only_loss",
)
# Gradients in float16 are scaled, and the scale is saved; the others round otherwise.
PRECISION = ("bf16", "fp16")
ARGUMENTS = (*IN_OPTIMIZER, "lr_scheduler_type", *OF_THE_ROWS, *OF_THE_LOSS, *PRECISION)
# Where a model or a machine was, not what is trained.
NOT_OF_THE_METHOD = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")
METHOD, OPTIONS, BASE, TRAINED = "peft_method", "peft_kwargs", "base weights", "trained weights"
TEACHER = "teacher_model"
MAX_SHOWN_FIELDS, MAX_SHOWN_CHARACTERS = 3, 80


class Taught(Protocol):
    """What a teacher's part in a run is recognised by."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """The teacher, and how it is learned from, as JSON."""


class Identified(Protocol):
    """What a run is recognised by."""

    args: LeftTrainingArguments
    source: ModelSource
    method: PeftMethod | None
    hooks: MethodHooks
    teaching: Taught | None
    model: Any
    train_dataset: Any
    vocabulary: TrimmedVocabulary | None


def identity_of_model(trainer: Identified) -> dict[str, Any]:
    """Method, base model and what is trained, as JSON. Before the first step: several methods change them later."""
    model, config = unwrapped(trainer.model), trainer.source.config
    return _plain(
        {
            METHOD: trainer.method.name if trainer.method else None,
            TEACHER: trainer.teaching.identity if trainer.teaching else None,
            OPTIONS: {**_method_options(model), **trainer.hooks.options},
            "model": {"model_type": config.model_type, **_sizes(config)},
            BASE: _base_weights(model),
            **({"vocabulary": _digest(trainer.vocabulary.kept_ids)} if trainer.vocabulary else {}),
            TRAINED: {name: _shape(weight) for name, weight in model.named_parameters() if weight.requires_grad},
        }
    )


def identity_of_training(args: LeftTrainingArguments, rows: Any) -> dict[str, Any]:
    """The rows and the arguments that decide what a step does, as JSON."""
    number = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return _plain(
        {
            ROWS: _data(rows),
            "per_device_train_batch_size x gradient_accumulation_steps x processes": number,
            **{name: getattr(args, name) for name in ARGUMENTS if hasattr(args, name)},
            "shrinking": {**args.target_size, **dataclasses.asdict(args.shrinking)} if loses_parts(args) else None,
            "optim": str(getattr(args.optim, "value", args.optim)).removesuffix("_fused"),  # which the device decides
        }
    )


def check_identity(mine: Mapping[str, Any], checkpoint: str | Path) -> None:
    """Refuse a checkpoint of another run.

    Checkpoints of earlier versions and of other trainers do not say what they belong to; they are not refused.

    Args:
        mine: The identity of the run that is to go on, or a part of it.
        checkpoint: Whole.

    Raises:
        ValueError: With the fields that differ and both values.
    """
    saved = (read_manifest(checkpoint) or {}).get(RUN) or {}
    found = {name: _difference(name, saved[name], mine[name]) for name in mine if name in saved}
    if found.get(METHOD) or found.get(OPTIONS):
        found.pop(BASE, None)  # of the layers without an adapter, which are others then
    differing = [text for text in found.values() if text]
    if differing:
        raise ValueError(
            f"{str(checkpoint)!r} belongs to another run, which cannot go on in this one: "
            f"{'; '.join(differing)}. Set what differs as it was. To train on from its weights in a new "
            "run, pass its folder as the model, and another output_dir."
        )


def _difference(name: str, saved: Any, mine: Any) -> str | None:
    """Text; `None` where there is no difference. Options that another version of a library did not know are none."""
    if saved == mine:
        return None
    if not (isinstance(saved, dict) and isinstance(mine, dict)):
        return f"{name} was {_shown(saved)} and is {_shown(mine)}"
    keys = saved.keys() | mine.keys() if name == TRAINED else saved.keys() & mine.keys()
    differing = sorted(key for key in keys if saved.get(key) != mine.get(key))
    if not differing:
        return None
    shown = [f"{key} was {_shown(saved.get(key))} and is {_shown(mine.get(key))}" for key in differing]
    more = len(shown) - MAX_SHOWN_FIELDS
    return f"{name}: {', '.join(shown[:MAX_SHOWN_FIELDS])}" + (f" and {more} more" if more > 0 else "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(values, default=_as_json))
    return plain


def _as_json(value: Any) -> Any:
    """Sets in an order, and of objects without a lasting text their type."""
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if isinstance(value, (torch.dtype, Path)):
        return str(value)
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__


def _method_options(model: nn.Module) -> dict[str, Any]:
    if not isinstance(model, PeftModel):
        return {}
    options = model.peft_config[model.active_adapters[0]].to_dict()
    return {name: value for name, value in options.items() if name not in NOT_OF_THE_METHOD}


def _sizes(config: Any) -> dict[str, int]:
    """Widths, depths and numbers of parts; ids of tokens are none of them."""
    values = {**config.to_dict(), **config.get_text_config().to_dict()}
    return {name: value for name, value in values.items() if type(value) is int and not name.endswith("_id")}


def _shape(weight: Any) -> list[int]:
    return list(getattr(weight, "ds_shape", weight.shape))  # that DeepSpeed has spread over processes


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
        some_values(weight).to(torch.bfloat16).tolist()
        for weight in frozen[:: max(1, len(frozen) // WEIGHTS_LOOKED_AT)]
    ]
    return _digest(some) if some else None


def _data(rows: Any) -> dict[str, Any] | None:
    """Number of the rows and digest of some of them; of a stream nothing, as reading it would take from the training.

    Of rows that are computed when they are read, which may differ each time, only the number.
    """
    if not isinstance(rows, Dataset):
        return None
    number = len(rows)
    if is_lazy(rows) or not number:
        return {"rows": number}
    return {"rows": number, "digest": _digest(dict(_columns(rows, range(0, number, -(-number // ROWS_LOOKED_AT)))))}


def _columns(rows: Dataset, places: range) -> Iterator[tuple[str, Any]]:
    columns = rows.with_format(None)[list(places)]
    yield from sorted(columns.items())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=_as_json).encode()).hexdigest()[:16]
