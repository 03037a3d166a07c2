"""How far a run is: the process that runs it writes a line to a file, the one that started it reads it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from left_trainer.adapters.text_files import write_whole

PROGRESS_FILE = "progress.txt"
LEAST_SECONDS = 0.5  # between two writings


def write_progress(folder: Path, text: str) -> None:
    """Say what the run in `folder` is doing."""
    write_whole(folder / PROGRESS_FILE, text)


def read_progress(folder: Path) -> str:
    """What the run in `folder` is doing; empty where it has not said so yet."""
    file = folder / PROGRESS_FILE
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def remove_progress(folder: Path) -> None:
    """A run that is over is doing nothing."""
    (folder / PROGRESS_FILE).unlink(missing_ok=True)


class ProgressFileCallback(TrainerCallback):
    """Writes the optimizer step, between steps and so outside of what their speed is taken from.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written = -LEAST_SECONDS

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the step, unless the last writing was just now."""
        now = time.monotonic()
        if state.is_world_process_zero and now - self._written >= LEAST_SECONDS:
            self._written = now
            write_progress(self.folder, f"step {state.global_step} of {state.max_steps}")
