"""On which devices a run may have its model: one for each process, or all of one process's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from left_trainer.kernels.compiled_blocks import compile_options
from left_trainer.kernels.fast_paths import first_reason
from left_trainer.models import ModelSource
from left_trainer.training_args import LeftTrainingArguments

HOST = ("cpu", "disk", "meta")
# With these, from_pretrained chooses among all devices that it sees.
CHOSEN_BY_SIZE = ("auto", "balanced", "balanced_low_0", "sequential")
ON_OWN_DEVICE = "Leave device_map out: each process then has the model on its own device."


def check_devices(args: LeftTrainingArguments, source: ModelSource) -> None:
    """Refuse devices with which the processes of a run, or the GPUs of one, would not do what they should.

    One process may have its model on several devices, by `device_map`. Several processes have one each, and several
    GPUs in one process without `device_map` would be wrapped in `nn.DataParallel`.

    Raises:
        ValueError: With what to set.
    """
    model_map = getattr(source.model, "hf_device_map", None)
    asked = model_map if source.is_loaded else source.options.get("device_map")
    devices = _devices(asked)
    if args.world_size > 1 and asked is not None:
        _check_of_process(asked, devices, args)
    elif len(devices - {*HOST}) < 2:
        check_one_replica(args)


def check_fast_dropout(args: LeftTrainingArguments) -> None:
    """Raise `ValueError` where nothing would draw the masks that `fast_dropout` asks for."""
    why_not = first_reason(
        {
            f"this run is on {args.device.type}, where torch draws masks in parallel": args.device.type != "cpu",
            "use_compact_dropout=False leaves dropout to torch": not args.use_compact_dropout,
            "torch_compile=True leaves dropout to the compiler": compile_options(args) is not None,
        }
    )
    if args.fast_dropout and why_not:
        raise ValueError(f"fast_dropout=True has no effect: {why_not}. Remove it.")


def check_one_replica(args: LeftTrainingArguments, model: nn.Module | None = None) -> None:
    """Refuse several GPUs in one process for a model that is not spread over them.

    Args:
        args: Of the run.
        model: Loaded.
    """
    if args.n_gpu > 1 and len(_devices(getattr(model, "hf_device_map", None)) - {*HOST}) < 2:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, and nn.DataParallel would average losses over unequal "
            "numbers of tokens. Start with `accelerate launch`, or make one visible by CUDA_VISIBLE_DEVICES=0. A model "
            "that is too large for one of them is spread over all with model_init_kwargs={'device_map': 'auto'}."
        )


def _check_of_process(asked: Any, devices: set[str], args: LeftTrainingArguments) -> None:
    """Refuse a model that is not on the one device of this process."""
    if len(devices) > 1:
        raise ValueError(
            f"device_map={asked!r} spreads the model over {', '.join(sorted(devices))}, and each of the "
            f"{args.world_size} processes of the run trains a model of its own. {ON_OWN_DEVICE} Where it is too large "
            "for one, start one process, python without torchrun or accelerate launch, or shard it with FSDP."
        )
    own, accelerator = str(args.device), args.device.type != "cpu"
    if accelerator and devices and devices != {own}:
        raise ValueError(
            f"device_map={asked!r} puts the models of all {args.world_size} processes on {next(iter(devices))}, and "
            f"this process trains on {own}. {ON_OWN_DEVICE}"
        )


def _devices(device_map: Any) -> set[str]:
    """The devices that `device_map` names, or may choose among."""
    if device_map is None:
        return set()
    if isinstance(device_map, str) and device_map in CHOSEN_BY_SIZE:
        number = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
        return {_name(index) for index in range(number)} or {"cpu"}
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    return {_name(place) for place in places}


def _name(place: Any) -> str:
    """`cuda:1` for 1, `torch.device("cuda", 1)` and `cuda:1`; `cuda:0` for `cuda`."""
    if str(place) in HOST or str(place).startswith("cpu"):
        return str(place).partition(":")[0]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = accelerator.type if accelerator else "cuda"
    text = f"{kind}:{place}" if isinstance(place, int) else str(place)
    return text if ":" in text else f"{text}:0"
