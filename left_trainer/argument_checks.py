"""What can be refused of training arguments by themselves, when they are constructed."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_utils import SchedulerType

from left_trainer.argument_ranges import check_fields
from left_trainer.ranges import check_regex, shown_value
from left_trainer.registry import did_you_mean

# Fields with options by name that may not also be the path of a file.
OPTIONS_BY_NAME = (
    "activation_checkpointing_kwargs",
    "dataset_kwargs",
    "gradient_checkpointing_kwargs",
    "lr_scheduler_kwargs",
    "model_init_kwargs",
)
# Fields with options that may also be the path of a file.
OPTIONS_OR_PATH = ("accelerator_config", "deepspeed", "fsdp_config")
# Trackers that transformers does not look for when it lists what is installed.
NOT_LOOKED_FOR = ("flyte",)
# Of a scheduler's function, what Hugging Face's trainer passes itself.
PASSED_TO_SCHEDULERS = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs")


def check_arguments(args: TrainingArguments) -> None:
    """Check the fields of `args` and what they say of scheduler, trackers and modules.

    Raises:
        TypeError: A value of another type than the field's.
        ValueError: A value that no run can have.
    """
    check_fields(args)
    for name in OPTIONS_BY_NAME:
        _options_of(name, getattr(args, name, None))
    for name in OPTIONS_OR_PATH:
        _options_or_file(name, getattr(args, name, None))
    check_scheduler(args)
    check_trackers(args.report_to)
    for pattern in [args.optim_target_modules] if isinstance(args.optim_target_modules, str) else []:
        check_regex("optim_target_modules", pattern)


def _options_of(name: str, value: Any) -> Mapping[str, Any]:
    """Options by name, which may be written as a JSON object."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{name}={shown_value(value)} is not valid JSON: {error}. Write an object, such as '{{\"name\": 1}}'."
            ) from error
    if not isinstance(value, Mapping | None):
        raise TypeError(f"{name}={shown_value(value)} must be a JSON object, such as '{{\"name\": 1}}'.")
    return value or {}


def _options_or_file(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        return
    if value.lstrip().startswith("{"):
        _options_of(name, value)
    elif not Path(value).is_file():
        raise FileNotFoundError(f"{name}={value!r} is neither a file nor a JSON object, such as '{{\"name\": 1}}'.")


def check_scheduler(args: TrainingArguments) -> None:
    """Raise `ValueError` where `lr_scheduler_kwargs` are not those of the scheduler, by making one for a step."""
    kind = SchedulerType(args.lr_scheduler_type)
    options = dict(_options_of("lr_scheduler_kwargs", args.lr_scheduler_kwargs))
    if kind == SchedulerType.GREEDY or (not options and kind == SchedulerType.REDUCE_ON_PLATEAU):
        return
    allowed = _scheduler_options(kind)
    unknown = next((name for name in options if name not in allowed), None)
    if unknown is not None:
        raise ValueError(
            f"lr_scheduler_kwargs has {unknown!r}, which is not an argument of lr_scheduler_type={kind.value!r}."
            f"{did_you_mean(unknown, allowed)} Allowed: {', '.join(allowed) or 'none'}."
        )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        scheduler = get_scheduler(kind, optimizer, 0, 10, options)
        optimizer.step()
        scheduler.step(*([0.0] if kind == SchedulerType.REDUCE_ON_PLATEAU else []))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs={options!r} does not fit lr_scheduler_type={kind.value!r}: {error}. Allowed: "
            f"{', '.join(allowed) or 'none'}."
        ) from error


def _scheduler_options(kind: SchedulerType) -> list[str]:
    if kind == SchedulerType.REDUCE_ON_PLATEAU:
        names: Iterable[str] = inspect.signature(torch.optim.lr_scheduler.ReduceLROnPlateau).parameters
    else:
        names = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[kind]).parameters
    return [name for name in names if name not in PASSED_TO_SCHEDULERS]


def check_trackers(report_to: Any) -> None:
    """Raise `ValueError` for a tracker that transformers does not know."""
    for name in _trackers(report_to):
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"report_to={name!r} is not known.{did_you_mean(name, INTEGRATION_TO_CALLBACK)} Expected none, all, or "
                f"some of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}."
            )


def check_trackers_installed(report_to: Any) -> None:
    """Raise `ValueError` for a tracker whose package is not installed."""
    installed = get_available_reporting_integrations()
    for name in _trackers(report_to):
        if name not in (*installed, *NOT_LOOKED_FOR):
            raise ValueError(
                f"report_to={name!r} needs a package that is not installed. Install it (pip install {name}), or "
                f"set report_to='none'. Installed trackers: {', '.join(installed) or 'none'}."
            )


def _trackers(report_to: Any) -> list[str]:
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    return [str(name) for name in names if name not in ("all", "none")]
