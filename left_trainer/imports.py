"""Imports of torch, datasets, transformers, peft and trl in four fifths of the time that they take by themselves.

They make half a million objects, and the garbage collector visits all of them several times and finds nothing.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator

STACK = "left_trainer.trainer"  # imports all of it


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection inside; afterwards it is as it was."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def import_stack() -> None:
    """For a program, once it knows that it needs the stack: what is imported is never visited by the collector."""
    if STACK not in sys.modules:
        with without_collection():
            importlib.import_module(STACK)
        gc.freeze()
