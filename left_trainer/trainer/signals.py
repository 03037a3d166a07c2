"""Ctrl-C and SIGTERM during a training: a checkpoint after the step, then the end.

transformers has a callback for SIGTERM (`enable_jit_checkpoint`, 5.23). It does not serve: it waits three seconds
before it does anything, knows no Ctrl-C, lets the processes of one run stop at different steps, and then goes on as if
the training had reached its end, so that a half-trained model is saved as the result and the exit code is 0. Where it
is switched on, SIGTERM is left to it.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from left_trainer.interrupts import TERMINATED, handling, interrupted, leave_to_default, say


class _StepSavedError(Exception):
    """Unwinds the training loop once the checkpoint is written."""


class _StoppedInEvaluationError(Exception):
    """Unwinds an evaluation during training; the step before it is complete and not saved yet."""


@contextlib.contextmanager
def saving_on_signal(trainer: Any) -> Iterator[None]:
    """Inside, the first Ctrl-C or SIGTERM saves a checkpoint after the current step; a second one stops at once.

    Raises:
        KeyboardInterrupt: After Ctrl-C.
        SystemExit: With code 143, after SIGTERM.
    """
    if not trainer.args.save_on_signal:
        yield
        return
    stop = SaveOnSignal()
    trainer.add_callback(stop)
    signals = [signal.SIGINT] if trainer.args.enable_jit_checkpoint else [signal.SIGINT, signal.SIGTERM]
    try:
        with handling(dict.fromkeys(signals, stop.handler(is_first=trainer.is_world_process_zero()))):
            yield
    except _StepSavedError:
        _end(trainer, stop.number)
    except _StoppedInEvaluationError:
        trainer._save_checkpoint(trainer.model, None)
        _end(trainer, stop.number)
    except Exception as error:
        if not stop.number:
            raise
        # Workers that load data heard of Ctrl-C too, and the step fails without them.
        say("  The step could not be finished.\n")
        raise _ending(stop.number) from error
    finally:
        trainer.remove_callback(stop)


def _end(trainer: Any, number: int) -> None:
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        say(f" Saved {folder}; go on with resume_from_checkpoint=True (--resume_from_checkpoint true).\n")
    raise _ending(number) from None


def _ending(number: int) -> BaseException:
    return interrupted() if number == signal.SIGINT else SystemExit(TERMINATED)


class SaveOnSignal(TrainerCallback):
    """Saves a checkpoint after the step in which a signal came, the same one in all processes, and ends the training.

    The evaluation that may be due after this step is left out: there may be no time for it.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal; 0 before there is one
        self._is_saving = False
        # On the CPU, so that no GPU is waited for after each step.
        self._group = distributed.new_group(backend="gloo") if _n_processes() > 1 else None

    def handler(self, is_first: bool) -> Any:
        """The handler to install; it speaks in the first process alone."""
        owner = os.getpid()

        def handle(number: int, frame: FrameType | None) -> None:
            if os.getpid() != owner:
                leave_to_default(number, owner)
                return
            if self.number:
                if is_first:
                    say(" Stopped at once.\n")
                raise _ending(number)
            self.number = number
            if is_first:
                name = signal.Signals(number).name
                say(f"\n{name}: a checkpoint is saved after this step; a second signal stops at once.")

        handle.is_of_left_trainer = True  # type: ignore[attr-defined]
        return handle

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint if any process has had a signal."""
        if self._is_asked():
            control.should_save, control.should_evaluate, self._is_saving = True, False, True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the training once the checkpoint is there."""
        if self._is_saving:
            raise _StepSavedError

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End an evaluation; several processes finish theirs, and stop after the next step."""
        if self.number and self._group is None and not self._is_saving:
            raise _StoppedInEvaluationError

    def _is_asked(self) -> bool:
        if self._group is not None:
            number = torch.tensor(self.number)
            distributed.all_reduce(number, distributed.ReduceOp.MAX, group=self._group)
            self.number = int(number)
        return self.number > 0


def _n_processes() -> int:
    is_running = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_running else 1
