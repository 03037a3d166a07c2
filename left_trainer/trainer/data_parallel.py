"""`DistributedDataParallel` around a model that was evaluated before, and one whose parameters change their shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

# Set by accelerate on a model that it has prepared.
PREPARED = "_is_accelerate_prepared"


def wrap_for_training(trainer: Any) -> None:
    """Have `Trainer` wrap a model for its training that was prepared for an evaluation alone.

    accelerate (1.15) takes it for one that is wrapped already. Each process would train alone, on its own rows, and
    the weights of the first would be saved. DeepSpeed wraps for an evaluation too, and FSDP2 where it can.

    Args:
        trainer: Before its training.
    """
    model = trainer.model
    is_wrapped = trainer.is_deepspeed_enabled or isinstance(trainer.model, FSDPModule)
    is_wrapped = is_wrapped or isinstance(trainer.model_wrapped, DistributedDataParallel)
    if trainer.args.world_size == 1 or is_wrapped or not getattr(model, PREPARED, False):
        return
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # takes mixed precision off its forward
    setattr(model, PREPARED, False)
    trainer.model_wrapped = model


@contextlib.contextmanager
def shapes_may_change(wrapped: nn.Module, ddp_handler: Any) -> Iterator[None]:
    """Inside, parameters of what `wrapped` holds may be cut, go or come back.

    Its reducer has buckets of their shapes, and hooks on them. It goes before, and a new one is made after; `wrapped`
    stays the object that the training loop calls.

    Args:
        wrapped: The model as the training loop calls it, with or without the wrapper.
        ddp_handler: Of accelerate, with the arguments that the wrapper was made with; `None` for the defaults.
    """
    if not isinstance(wrapped, DistributedDataParallel):
        yield
        return
    inner = wrapped.module
    devices: dict[str, Any] = {"device_ids": wrapped.device_ids, "output_device": wrapped.output_device}
    vars(wrapped).pop("reducer", None)
    vars(wrapped).pop("logger", None)
    yield
    wrapped.__init__(inner, **devices, **(ddp_handler.to_kwargs() if ddp_handler else {}))  # type: ignore[misc]
    if ddp_handler is not None:
        ddp_handler.register_comm_hook(wrapped)
