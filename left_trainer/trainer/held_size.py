"""The last size that `keep` allows: a copy of the whole run at that size, to which the run can return."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from left_trainer.compression.shrink_state import ShrinkState
from left_trainer.compression.structure import Structure
from left_trainer.storage.whole import whole_directory
from left_trainer.trainer.checkpoints import checkpoints_in

NAME = "held-size"
WEIGHTS_FILE, OPTIMIZER_FILE = "weights.pt", "optimizer.pt"
OF_THE_SCHEDULE = ("lr", "initial_lr")


def held_folder(output_dir: str | Path, step: int) -> Path:
    """Where the copy of the size that the model had at the end of `step` is."""
    return Path(output_dir) / f"{NAME}-{step}"


class HeldSize:
    """A size that the run may return to.

    Args:
        trainer: Whose model has this size.
        state: How far it has shrunk.
    """

    def __init__(self, trainer: Any, model: Any, state: ShrinkState) -> None:
        self.trainer, self.state = trainer, state
        self.structure = Structure(model)

    def write(self, step: int) -> None:
        """Write the weights and the state of the optimizer as they are at the end of `step`."""
        trainer = self.trainer
        if trainer.args.should_save:
            values = self.structure.values()
            size = sum(tensor.nbytes for tensor in values.values())
            with whole_directory(held_folder(trainer.args.output_dir, step), 3 * size) as folder:
                torch.save(values, folder / WEIGHTS_FILE)
                torch.save(trainer.optimizer.state_dict(), folder / OPTIMIZER_FILE)
                self.state.write(folder)
        trainer.accelerator.wait_for_everyone()

    def put_back(self, step: int) -> None:
        """Give the run the size, the weights and the state of the optimizer that were written at the end of `step`.

        The learning rate stays that of the present step.
        """
        folder = held_folder(self.trainer.args.output_dir, step)
        self.structure.put_back(torch.load(folder / WEIGHTS_FILE, map_location="cpu", weights_only=True))
        restart_optimizer(self.trainer, torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True))


def restart_optimizer(trainer: Any, state: dict[str, Any]) -> None:
    """Let the optimizer go on with the parameters that the model has now, from `state`; the schedule holds it still."""
    wrapped = trainer.optimizer
    trainer.optimizer = None
    try:
        fresh = trainer.create_optimizer()
    finally:
        trainer.optimizer = wrapped
    fresh.load_state_dict(state)
    running = getattr(wrapped, "optimizer", wrapped)
    for new, old in zip(fresh.param_groups, running.param_groups, strict=True):
        new.update({name: old[name] for name in OF_THE_SCHEDULE if name in old})
    running.param_groups[:] = fresh.param_groups
    running.state = fresh.state


def remove_unneeded(output_dir: str | Path, state: ShrinkState) -> None:
    """Remove copies of sizes that neither the run nor one of its checkpoints may return to."""
    states = [state, *(ShrinkState.read(checkpoint) for checkpoint in checkpoints_in(output_dir))]
    needed = {held_folder(output_dir, each.held_step) for each in states if each and each.held_step is not None}
    for folder in Path(output_dir).glob(f"{NAME}-*"):
        if folder.name.removeprefix(f"{NAME}-").isdigit() and folder not in needed:
            shutil.rmtree(folder, ignore_errors=True)
