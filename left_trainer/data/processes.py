"""What one process does for all of its machine."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from accelerate import PartialState


def first_process_of_machine_first(dataset: Any = None) -> contextlib.AbstractContextManager[None]:
    """Inside, the other processes wait for the first one, whose stored rows they then read instead of making them.

    Args:
        dataset: What is mapped inside. One without files makes none, and no process waits.
    """
    makes_files = dataset is None or getattr(dataset, "cache_files", None)
    if not torch.distributed.is_initialized() or not makes_files:
        return contextlib.nullcontext()
    return PartialState().local_main_process_first()
