"""`DistributedDataParallel` around a model whose parameters change their shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


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
