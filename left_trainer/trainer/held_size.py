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
from left_trainer.trainer.machines import on_every_machine

NAME = "held-size"
WEIGHTS_FILE, OPTIMIZER_FILE = "weights.pt", "optimizer.pt"
OF_THE_SCHEDULE = ("lr", "initial_lr")


def held_folder(output_dir: str | Path, step: int) -> Path:
    """Where the copy of the size that the model had at the end of `step` is."""
    return Path(output_dir) / f"{NAME}-{step}"


class HeldSize:
    """A size that the run may return to.

    Args:
        trainer: Of the run.
        state: How far the model had shrunk.
        step: At whose end.
    """

    def __init__(self, trainer: Any, state: ShrinkState, step: int) -> None:
        self.trainer, self.state = trainer, state
        self.folder = held_folder(trainer.args.output_dir, step)
        self.structure: Structure | None = None

    @classmethod
    def read(cls, trainer: Any, checkpoint: str, step: int) -> HeldSize:
        """The size that a run went on with from `checkpoint`; its copy stands beside that.

        Raises:
            ValueError: There is no copy.
        """
        written = held_folder(Path(checkpoint).parent, step)
        written = Path(on_every_machine(written, trainer.args) or written)
        state = ShrinkState.read(written)
        if state is None:
            raise ValueError(
                f"{checkpoint!r} cannot be continued: {str(written)!r} is missing, the last size that keep allows. "
                "Start anew, or go on from another checkpoint."
            )
        held = cls(trainer, state, step)
        if trainer.args.should_save and held.folder.resolve() != written.resolve():
            with whole_directory(held.folder) as folder:
                shutil.copytree(written, folder, dirs_exist_ok=True)
        trainer.accelerator.wait_for_everyone()
        return held

    def remember(self, model: Any) -> None:
        """Note the parts of `model`, which has this size."""
        self.structure = Structure(model)

    def write(self) -> None:
        """Write the weights and the state of the optimizer as they are."""
        trainer, structure = self.trainer, self.structure
        assert structure is not None
        if trainer.args.should_save:
            values = structure.values()
            size = sum(tensor.nbytes for tensor in values.values())
            with whole_directory(self.folder, 3 * size) as folder:
                torch.save(values, folder / WEIGHTS_FILE)
                torch.save(trainer.optimizer.state_dict(), folder / OPTIMIZER_FILE)
                self.state.write(folder)
        trainer.accelerator.wait_for_everyone()

    def put_back(self) -> None:
        """Give the run this size, with the weights and the state of the optimizer that were written.

        The learning rate stays that of the present step.
        """
        assert self.structure is not None
        folder = Path(on_every_machine(self.folder, self.trainer.args) or self.folder)
        self.structure.put_back(_read(folder / WEIGHTS_FILE))
        restart_optimizer(self.trainer, _read(folder / OPTIMIZER_FILE))


def _read(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


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
