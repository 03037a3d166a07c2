"""What a run says of its needs before it loads weights, and where it stops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from left_trainer.callbacks.tables import format_bytes
from left_trainer.planning.advice import Change, changes, together
from left_trainer.planning.devices import Device, device_at_hand
from left_trainer.planning.lengths import RowLengths, row_lengths
from left_trainer.planning.plan import TrainingPlan, plan_training
from left_trainer.planning.planned_run import PlannedRun
from left_trainer.trainer.checks import Request
from left_trainer.trainer.preparation import free_positions, options_from_data
from left_trainer.training_args import LeftTrainingArguments

GIB = 2**30
MOST_REASON = 200  # characters of why there is no plan


class DoesNotFitError(ValueError):
    """A run needs more memory than its device has."""


def announce_plan(request: Request, tokenizer: PreTrainedTokenizerBase | None) -> PlannedRun | None:
    """Plan the run, print what it will need, and return that; `None` where it cannot be planned, which stops nothing.

    Args:
        request: Checked.
        tokenizer: Of the model.

    Raises:
        DoesNotFitError: The run needs more than the device has, and `ignore_plan` is off. The message has the
            arguments with which it would fit.
    """
    args = request.args
    is_main = args.process_index == 0
    try:
        planner = RunPlanner(request, options_from_data(request, tokenizer), lengths_of(request, tokenizer))
        plan = planner()
        planned = _planned_run(plan, planner.device, request)
    except Exception as error:  # a plan serves the run and may not be what stops it
        if is_main:
            reason = " ".join(str(error).split())[:MOST_REASON] or type(error).__name__
            print(f"Plan: this run could not be planned, and goes on without. {reason}", flush=True)
        return None
    if is_main:
        print(f"Plan: the run {described(planned)}.", flush=True)
    if planned.run_bytes > planned.device_bytes and not args.ignore_plan:
        raise DoesNotFitError(_refusal(planned, plan, planner))
    return planned


class RunPlanner:
    """Plans a run, as it is or with changes of its arguments.

    Args:
        request: Checked.
        options: Of the method, those that it takes from the data included.
        lengths: Of the training rows, cut; `None` for those of `max_length`.

    Raises:
        ValueError: A plan would not be of this run.
    """

    def __init__(self, request: Request, options: Mapping[str, Any], lengths: RowLengths | None) -> None:
        _check_is_on_one_device(request)
        self.request, self.args, self.options = request, request.args, dict(options)
        self.device = device_at_hand(request.args.device)
        self.dtype = str(request.source.options.get("dtype") or "float32").removeprefix("torch.")
        self.config = copy.copy(request.peft_config or request.source.adapter)
        if self.config is not None:
            self.config.inference_mode = False  # as an adapter on a disk says
        self.source = lengths.source if lengths else None
        self.target = lengths.target if lengths else None

    def __call__(
        self, source_tokens: int | None = None, dtype: str | None = None, peft_method: str | None = None, **values: Any
    ) -> TrainingPlan:
        if peft_method is not None:
            values |= {"peft_method": peft_method, "peft_kwargs": None}
        else:
            values |= {"peft_kwargs": self.options}
        return plan_training(
            self.request.source,
            self.args.replaced(**values),
            peft_config=self.config,
            source_tokens=self.source,
            target_tokens=self.target,
            dtype=dtype,
            device=self.device,
            quantization_config=self.request.quantization_config,
            teacher_model=self.request.teacher,
        )


def lengths_of(request: Request, tokenizer: PreTrainedTokenizerBase | None) -> RowLengths | None:
    """The lengths of the training rows as the run cuts them; `None` where they are not known before they are read."""
    args, family = request.args, request.source.family
    if request.formatting_func is not None or args.packing:
        return None
    found = row_lengths(request.train_dataset, family, tokenizer, args.dataset_text_field)
    free = free_positions(request, args.peft_options).at_most(args.max_length)
    return found and found.cut(family, free.source, free.target)


def _check_is_on_one_device(request: Request) -> None:
    args = request.args
    is_spread = bool(args.fsdp or args.deepspeed or request.source.options.get("device_map"))
    if is_spread:
        raise ValueError("FSDP, DeepSpeed and device_map spread a model over devices; a plan is of one device.")


def _planned_run(plan: TrainingPlan, device: Device, request: Request) -> PlannedRun:
    seconds = plan.time_on(device).seconds if device.bandwidth is not None else None
    run_bytes = plan.run_bytes
    if request.source.is_loaded and device.kernels == "cpu":  # what is free has lost these already
        run_bytes -= sum(plan.step.parts.get(part, 0) for part in ("frozen weights",))
    return PlannedRun(
        rows=plan.batch.rows,
        source_tokens=plan.batch.source,
        target_tokens=plan.batch.target,
        peak_bytes=plan.peak_bytes,
        peak_phase=plan.peak_phase,
        run_bytes=run_bytes,
        device_bytes=device.memory_bytes,
        device=device.name,
        step_seconds=seconds,
    )


def described(planned: PlannedRun) -> str:
    """What a run needs, when, and what there is."""
    shape = f"{planned.rows} row{'s' * (planned.rows != 1)} of {planned.source_tokens} + {planned.target_tokens} tokens"
    seconds = planned.step_seconds
    time = f"; a step on rows of this length takes about {seconds:.2g} s" if seconds else ""
    return (
        f"needs {format_bytes(planned.run_bytes)} of the {format_bytes(planned.device_bytes)} of {planned.device}, for "
        f"{shape}, most of it in the {planned.peak_phase} phase of a step{time}"
    )


def _refusal(planned: PlannedRun, plan: TrainingPlan, replan: RunPlanner) -> str:
    """Why the run stops, and what to change."""
    kept, best = _what_fits(plan, replan, replan.args, replan.dtype, planned.device_bytes)
    flags = " ".join(change.flags for change in kept)
    if not kept:
        advice = "No change of the arguments that is known here saves memory: take a smaller model or shorter rows."
    elif best.fits(planned.device_bytes):
        advice = f"With {flags} it needs {best.run_bytes / GIB:.2f} GiB."
    else:
        advice = (
            f"Even with {flags} it needs {best.run_bytes / GIB:.2f} GiB: take a smaller model, a larger device, or "
            "shorter rows."
        )
    return (
        f"The run {described(planned)}. {advice} `left-trainer plan` with the same options shows where the memory "
        "goes; --ignore_plan starts the run as it is."
    )


def _what_fits(
    plan: TrainingPlan, replan: Callable[..., TrainingPlan], args: LeftTrainingArguments, dtype: str, memory_bytes: int
) -> tuple[list[Change], TrainingPlan]:
    with torch.random.fork_rng(devices=[]):
        return together(plan, replan, changes(args, dtype), args, memory_bytes)
