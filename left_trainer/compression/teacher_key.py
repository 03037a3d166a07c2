"""What the kept answers of a teacher belong to: by their key a later run knows whether it may go by them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from left_trainer.compression.teacher import Teacher
from left_trainer.compression_options import BASE_TEACHER, SELF_TEACHER
from left_trainer.models import without_adapter

VALUES_OF_A_WEIGHT = 8
OF_THE_STUDENT = (BASE_TEACHER, SELF_TEACHER)


def digest(value: Any) -> str:
    """Of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def teacher_key(teacher: Teacher) -> dict[str, str]:
    """Which teacher it is: its type and a digest of some values of each of its weights.

    Not its name: a folder may hold another model than before, and a model may have moved.

    Args:
        teacher: What a student without its adapter trains is no part of it.
    """
    base = without_adapter(teacher.model)
    return {
        "model_type": base.config.model_type,
        "dtype": str(base.dtype).removeprefix("torch."),
        "weights": _digest_of_weights(teacher, torch.float32),
    }


def recognised_by(teacher: Teacher) -> str | None:
    """What a run knows its teacher by, in any dtype; `None` where the student says it, or packed weights hide it."""
    if teacher.title in OF_THE_STUDENT or getattr(teacher.model, "is_quantized", False):
        return None
    return _digest_of_weights(teacher, torch.bfloat16)


def _digest_of_weights(teacher: Teacher, dtype: torch.dtype) -> str:
    weights = [
        weight.detach().flatten()
        for weight in teacher.model.parameters()
        if not (teacher.is_base and weight.requires_grad) and not weight.is_meta and not isinstance(weight, DTensor)
    ]
    return digest([some_values(weight).to(dtype).tolist() for weight in weights])


def some_values(weight: torch.Tensor) -> torch.Tensor:
    """A few values of a flat weight, by which it is recognised."""
    return weight[:: max(1, len(weight) // VALUES_OF_A_WEIGHT)][:VALUES_OF_A_WEIGHT]


def vocabulary_key(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Which token each id is."""
    return digest({} if tokenizer is None else tokenizer.get_vocab())


def differences(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the entries in which two keys differ."""
    return sorted(name for name in {*kept, *now} if kept.get(name) != now.get(name))
