"""A trainer whose checkpoints are whole or absent, and say what they belong to."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from left_trainer.adapters.files import TRAINING_STATE_FILE
from left_trainer.methods.hooks import MethodHooks
from left_trainer.methods.saving import check_saved_adapter, restore_training_state, training_state
from left_trainer.models import unwrapped, without_adapter
from left_trainer.models.hub import asking_hub
from left_trainer.storage.errors import write_errors
from left_trainer.storage.manifest import write_manifest
from left_trainer.storage.whole import finish, hidden_name, put_in_place, sweep
from left_trainer.trainer.checkpoints import (
    TRAINER_STATE_FILE,
    checkpoint_to_resume,
    make_way,
    remove_old_checkpoints,
    why_not_loadable,
)
from left_trainer.trainer.figures import figures_of_all
from left_trainer.trainer.machines import is_first_of_its_disk, of_first_process, on_every_machine
from left_trainer.trainer.model_card import CardNotes
from left_trainer.trainer.pushing import push_checkpoint, push_run, wait_for_pushes
from left_trainer.trainer.reading import ReadingTrainer
from left_trainer.trainer.run_identity import (
    ROWS,
    RUN,
    WRITTEN_ROWS,
    check_identity,
    identity_of_model,
    identity_of_training,
)
from left_trainer.trainer.teaching import Teaching
from left_trainer.trainer.walks import quick_walks


class CheckpointingTrainer(ReadingTrainer):
    """Writes each checkpoint under a hidden name, describes its files, and renames it. All processes write into it."""

    card_notes = CardNotes()
    _written_beside: Path | None = None
    hooks: MethodHooks
    teaching: Teaching | None
    model_init: Any
    features_given: Any = None  # where a teacher's targets have taken their place
    _identity_of_model: Mapping[str, Any] | None = None
    _identity_of_run: Mapping[str, Any] | None = None  # found once: it reads some thousand rows

    def checkpoint_of_run(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The checkpoint that `train` goes on from, `None` for the beginning. Raises what `train` does."""
        has_trained = self.state.global_step > 0
        self._identity_of_run = None
        if self.model is None:  # each trial of a search makes its own, and none is resumed
            return checkpoint_to_resume(resume_from_checkpoint, self.args, lambda checkpoint: None, (), has_trained)
        if self._identity_of_model is None or self.model_init is not None:  # a training changes some configs
            self._identity_of_model = identity_of_model(self)
        needed = [TRAINING_STATE_FILE] if training_state(unwrapped(self.model)) else []
        self._identity_of_run = self._identity()
        check = functools.partial(check_identity, self._identity_of_run)
        return checkpoint_to_resume(resume_from_checkpoint, self.args, check, needed, has_trained)

    def _identity(self) -> dict[str, Any]:
        model, rows = self._identity_of_model or {}, self.train_dataset
        if self.features_given is None:
            return {**model, **identity_of_training(self.args, rows)}
        written = identity_of_training(self.args, rows)[ROWS]
        return {**model, **identity_of_training(self.args, self.features_given), WRITTEN_ROWS: written}

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._written_beside is None else str(self._written_beside)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that had come to its end within an epoch would train one more step when resumed (transformers 5.23).
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        with quick_walks(self.model_wrapped, without_adapter(self.model)):
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial))
        target = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        # One name for all processes, which may be on machines without a common disk.
        beside = run_dir / of_first_process(hidden_name(target).name)
        try:
            with write_errors(target):
                beside.mkdir(parents=True, exist_ok=True)
                self._written_beside = beside
                super()._save_checkpoint(model, trial)
                self._written_beside = None
                self._finish(beside, target)
        finally:
            self._written_beside = None
            if self.args.should_save:
                shutil.rmtree(beside, ignore_errors=True)
        if self.args.save_total_limit:
            wait_for_pushes(self)  # which read the checkpoint that may be removed
        if self.args.should_save:
            remove_old_checkpoints(target, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            push_checkpoint(self, str(target))

    def _finish(self, beside: Path, target: Path) -> None:
        """Put what all processes have written in its place."""
        written = beside / target.name
        self._name_best(target)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            sweep(target.parent, target.name)
            self.state.save_to_json(str(written / TRAINER_STATE_FILE))
            self._put_in_place(written, target)
        self.accelerator.wait_for_everyone()
        # Of processes on another machine's own disk.
        if is_first_of_its_disk(target, self.args) and not self.args.should_save and written.is_dir():
            self._put_in_place(written, target)
            shutil.rmtree(beside, ignore_errors=True)

    def _put_in_place(self, written: Path, target: Path) -> None:
        write_manifest(written, {RUN: self._identity_of_run or self._identity()})
        finish(written)
        make_way(target)
        put_in_place(written, target)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, which is shown a folder without checkpoints: it would remove whatever is called like one.

        It goes by the beginning of the name, or of a parent's (transformers 5.23).
        """
        run_dir, best = Path(super()._get_output_dir(trial)), self.state.best_model_checkpoint
        self._written_beside = hidden_name(run_dir)
        try:
            output = super()._finalize_training(trial, *args, **kwargs)
        finally:
            self._written_beside = None
        self.figures = figures_of_all(self)
        if self.args.should_save and self.args.save_total_limit == 1 and best and Path(best).is_dir():
            remove_old_checkpoints(run_dir / Path(best).name, limit=1, best=None)
        return output

    def _name_best(self, target: Path) -> None:
        """The best checkpoint by the name that it will have, also where it is this one."""
        if self.state.best_global_step:
            best = target.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if best == target or best.is_dir():
                self.state.best_model_checkpoint = str(best)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.teaching is not None and self.args.should_save:
            self.teaching.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.teaching is not None and checkpoint is not None:
            self.teaching.load(checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: `Trainer` calls this with a folder that has not got its name yet."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in `Trainer`, with errors that say what to do."""
        with asking_hub("hub_model_id", self.args.hub_model_id or Path(str(self.args.output_dir)).name):
            super().init_hf_repo(token=token, private=private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """As in `Trainer`; `card` is for `create_model_card`."""
        return push_run(self, commit_message, blocking, token, revision, private, **card)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.hooks.restore(unwrapped(self.model), resume_from_checkpoint)
        check_saved_adapter(unwrapped(self.model), resume_from_checkpoint)
        if not restore_training_state(unwrapped(self.model), resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        reason = of_first_process(why_not_loadable(best) if self.args.process_index == 0 else None)
        if reason:
            raise ValueError(
                f"load_best_model_at_end=True, but {best!r} cannot be loaded: {reason}. The checkpoints beside it hold "
                "the weights of other steps."
            )
        best = self.state.best_model_checkpoint = on_every_machine(best, self.args) or best
        if not restore_training_state(unwrapped(self.model), best):
            super()._load_best_model()
