"""What stands around a training: one process to a folder, a checkpoint when it is stopped, one sentence for a disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from left_trainer.storage.errors import write_errors
from left_trainer.storage.locks import check_folder_free, folder_lock
from left_trainer.storage.whole import sweep
from left_trainer.trainer.signals import saving_on_signal
from left_trainer.training_args import LeftTrainingArguments


@contextlib.contextmanager
def guarded_training(trainer: Any) -> Iterator[None]:
    """Hold the lock of `output_dir`, sweep what killed processes left there, and end in order when stopped.

    Of several processes, the first holds the lock for all.

    Raises:
        FolderInUseError: Another run is in `output_dir`.
        WriteFailedError: The disk is full, read-only or gone.
    """
    args: LeftTrainingArguments = trainer.args
    folder = str(args.output_dir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(write_errors(folder))
        if args.process_index == 0:
            stack.enter_context(folder_lock(folder))
            sweep(folder)
        stack.enter_context(saving_on_signal(trainer))
        yield


def check_folder_free_for(args: LeftTrainingArguments) -> None:
    """Raise `FolderInUseError` where another process trains in `output_dir`: before weights are loaded."""
    if args.process_index == 0:
        check_folder_free(str(args.output_dir))
