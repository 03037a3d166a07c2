"""Resume and best-model restore on a plain `Trainer`, for methods whose adapter file leaves something out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from left_trainer.callbacks.adapter_saver import unwrap
from left_trainer.methods.saving import complete_adapter_directory, restore_training_state, training_state
from left_trainer.training_args import LeftTrainingArguments


class AdapterRestoreCallback(TrainerCallback):
    """Restore, on a plain `Trainer`, what PEFT's adapter file leaves out, such as P-tuning's encoder.

    This callback acts: it changes the weights of the model, where `Trainer` would go on from wrong ones.

    - On each save it adds to the checkpoint what the adapter file leaves out.
    - On resume it restores that from the checkpoint, which has to be in `output_dir`.
    - After `load_best_model_at_end` it restores that from the best checkpoint.

    It does nothing for methods that need only the adapter file. It does nothing with `LeftTrainingArguments` either:
    `LeftTrainer` restores by itself. It cannot help prefix tuning with a projection: `Trainer` stops on its checkpoints
    with a shape error before any callback is called. `LeftTrainer` resumes it.

    Logs no keys. Files: `adapter_training_state.safetensors` in each checkpoint of such a method.

    Raises:
        FileNotFoundError: On resume, when the method needs such a file and the checkpoint has none, or is not in
            `output_dir`.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """After a resume, restore what the checkpoint's adapter file leaves out."""
        if state.global_step == 0 or _restores_by_itself(args):
            return
        checkpoint = _checkpoint(args, state)
        if not checkpoint.is_dir() and training_state(unwrap(model)):
            raise FileNotFoundError(
                f"AdapterRestoreCallback restores from {str(checkpoint)!r}, which does not exist. Resume from a "
                "checkpoint in output_dir, or move the checkpoint there."
            )
        restore_training_state(unwrap(model), checkpoint)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Complete the checkpoint."""
        checkpoint = _checkpoint(args, state)
        if state.is_world_process_zero and checkpoint.is_dir() and not _restores_by_itself(args):
            complete_adapter_directory(unwrap(model), checkpoint, checkpoint)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """After `load_best_model_at_end`, restore what the best checkpoint's adapter file leaves out."""
        if args.load_best_model_at_end and state.best_model_checkpoint and not _restores_by_itself(args):
            restore_training_state(unwrap(model), state.best_model_checkpoint)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or "") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _restores_by_itself(args: TrainingArguments) -> bool:
    """Whether the trainer is a `LeftTrainer`, which a callback can tell from the arguments alone."""
    return isinstance(args, LeftTrainingArguments)
