"""Checkpoints of a run: which are there, and going on from one."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from left_trainer.training_args import LeftTrainingArguments

TRAINER_STATE_FILE = "trainer_state.json"


def checkpoint_to_resume(
    resume_from_checkpoint: str | bool | None, args: LeftTrainingArguments, has_trained: bool = False
) -> str | bool | None:
    """The checkpoint that a run starts from; room is made for a fresh one.

    Args:
        resume_from_checkpoint: As in `Trainer.train`; also the text `true`, as a flag gives it.
        args: Of the run.
        has_trained: Whether the checkpoints in `output_dir` are of an earlier call of the same trainer.

    Raises:
        FileExistsError: A fresh run, and `output_dir` holds checkpoints of another.
        FileNotFoundError: `True`, and there is no complete checkpoint.
    """
    if str(resume_from_checkpoint).lower() == "true":
        return last_complete_checkpoint(str(args.output_dir))
    if not resume_from_checkpoint and args.save_strategy != "no":
        clear_checkpoints(args, args.overwrite_output_dir or has_trained)
    return resume_from_checkpoint


def clear_checkpoints(args: LeftTrainingArguments, may_overwrite: bool) -> None:
    """Raise when a fresh run would write among the checkpoints of an earlier one; remove those if it may.

    Left there, they would be what a later resume finds.
    """
    checkpoints = sorted(Path(args.output_dir or "").glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    if checkpoints and not may_overwrite:
        raise FileExistsError(
            f"output_dir={args.output_dir!r} holds {checkpoints[-1].name} of an earlier run. Continue it with "
            "train(resume_from_checkpoint=True), choose another directory, or replace it with "
            "overwrite_output_dir=True (--overwrite_output_dir)."
        )
    if args.process_index == 0:
        for checkpoint in checkpoints:
            shutil.rmtree(checkpoint)


def last_complete_checkpoint(output_dir: str) -> str:
    """The newest checkpoint that was written to its end.

    `Trainer` writes `trainer_state.json` last, so a directory without it was cut off by a kill. Raises
    `FileNotFoundError` when there is none.
    """
    checkpoints = [
        path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (path / TRAINER_STATE_FILE).is_file()
    ]
    if not checkpoints:
        raise FileNotFoundError(
            f"resume_from_checkpoint=True, but output_dir={output_dir!r} holds no complete checkpoint. Pass the path "
            "of one, or start a new run without resume_from_checkpoint."
        )
    return str(max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2])))
