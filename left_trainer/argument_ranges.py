"""Which values the fields of the argument classes may have: ranges as data, and the check of a whole object.

Every field that holds a number has a range here, those that come from Hugging Face's classes included.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import typing
from typing import Any

from left_trainer.ranges import (
    ANY,
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    Range,
    allows_none,
    check_range,
    is_number,
    number_type,
    shown_value,
)
from left_trainer.registry import did_you_mean

# More would exhaust the processes of a machine before the first row is read.
PROCESSES = Range(at_least=0, at_most=1024)
# A number of steps, or below 1 a share of all steps.
STEPS_OR_SHARE = POSITIVE

TRAINING_RANGES: dict[str, Range] = {
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": NOT_NEGATIVE,
    "data_seed": SEED,
    "dataloader_num_workers": PROCESSES,
    "dataloader_prefetch_factor": COUNT,
    "dataset_num_proc": Range(at_least=1, at_most=1024),
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": COUNT,
    "eval_accumulation_steps": COUNT,
    "eval_delay": NOT_NEGATIVE,
    "eval_steps": STEPS_OR_SHARE,
    "generation_max_length": COUNT,
    "generation_num_beams": COUNT,
    "gradient_accumulation_steps": COUNT,
    "label_smoothing_factor": SHARE,
    "learning_rate": NOT_NEGATIVE,
    "linear_cross_entropy_workspace_bytes": Range(
        at_least=1, advice="Pass a number of bytes, or use_linear_cross_entropy=False for full logits."
    ),
    "local_rank": Range(at_least=-1),  # set by launchers
    "logging_steps": STEPS_OR_SHARE,
    "max_grad_norm": Range(at_least=0),
    "max_length": COUNT,
    "max_steps": Range(at_least=1, also=(-1,), meaning="as many as num_train_epochs takes"),
    "neftune_noise_alpha": NOT_NEGATIVE,
    "num_train_epochs": POSITIVE,
    "per_device_eval_batch_size": COUNT,
    "per_device_train_batch_size": COUNT,
    "router_aux_loss_coef": NOT_NEGATIVE,
    "save_steps": STEPS_OR_SHARE,
    "save_total_limit": COUNT,
    "seed": SEED,
    "torch_empty_cache_steps": COUNT,
    "warmup_steps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
}
MODEL_RANGES = {"pad_to_multiple_of": COUNT}
DATA_RANGES = {"max_train_samples": COUNT, "max_eval_samples": COUNT, "shuffle_buffer_size": COUNT}
RANGES = {**TRAINING_RANGES, **MODEL_RANGES, **DATA_RANGES}


@functools.cache
def hints_of(arguments: type) -> dict[str, Any]:
    """The type hints of a class of arguments, and those of its parents."""
    return typing.get_type_hints(arguments)


def check_fields(arguments: Any) -> None:
    """Check every field of an object of arguments: types, ranges, choices.

    Fields that a user's subclass adds, and that have no range here, may hold any finite number.

    Raises:
        TypeError: A value of another type than the field's.
        ValueError: A number outside of its range, or a name that is none of the choices.
    """
    hints = hints_of(type(arguments))  # type: ignore[arg-type]
    for field in dataclasses.fields(arguments):
        value, hint = getattr(arguments, field.name, None), hints[field.name]
        if value is None and allows_none(hint):
            continue
        _check_type(field, value, hint)
        if is_number(value):
            check_range(field.name, value, RANGES.get(field.name, ANY), _advice(field))
        choices = _choices(field, hint)
        if choices and isinstance(value, str) and value not in choices:
            raise ValueError(
                f"{field.name}={value!r} is not known.{did_you_mean(value, choices)} Expected one of "
                f"{', '.join(choices)}."
            )


def _check_type(field: dataclasses.Field[Any], value: Any, hint: Any) -> None:
    number, parts = number_type(hint), set(typing.get_args(hint)) or {hint}
    if number is not None and not _fits(value, number):
        expected = "an integer" if number is int else "a number"
    elif bool in parts and not (isinstance(value, bool) or (str in parts and isinstance(value, str))):
        expected = "true or false"
    elif (parts <= {str, type(None)} and is_number(value)) or (parts <= {str, type(None)} and value is None):
        expected = "a text"
    else:
        return
    raise TypeError(
        f"{field.name}={shown_value(value)} ({type(value).__name__}) must be {expected}. {_advice(field)}".rstrip()
    )


def _fits(value: Any, number: type) -> bool:
    return is_number(value) and (number is float or hasattr(value, "__index__"))


def _choices(field: dataclasses.Field[Any], hint: Any) -> tuple[str, ...]:
    """The names that a field may hold, where it holds one of several."""
    for part in (hint, *typing.get_args(hint)):
        if isinstance(part, type) and issubclass(part, enum.Enum) and list not in _origins(hint):
            return tuple(str(item.value) for item in part)
    return tuple(choice for choice in field.metadata.get("choices", ()) if isinstance(choice, str))


def _origins(hint: Any) -> tuple[Any, ...]:
    return tuple(typing.get_origin(part) for part in typing.get_args(hint))


def _advice(field: dataclasses.Field[Any]) -> str:
    """What to pass in place of a wrong value."""
    if field.default is dataclasses.MISSING:
        return ""
    return "Leave it out if unsure." if field.default is None else f"The default is {field.default!r}."
