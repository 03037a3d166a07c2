"""Checkpoints of a run: which are there and whole, going on from one, and removing old ones."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from left_trainer.storage.manifest import why_not_whole
from left_trainer.training_args import LeftTrainingArguments

logger = logging.get_logger(__name__)

TRAINER_STATE_FILE = "trainer_state.json"
RESULT_FILES = (ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
# DeepSpeed and FSDP keep the optimizer's state in folders of their own.
OPTIMIZER_STATES = (OPTIMIZER_NAME, "optimizer.bin", "optimizer_*", "global_step*")


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run from the first step to the last: folders `checkpoint-<number>`, and no links."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if NAME.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number in the name of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def why_not_resumable(checkpoint: str | Path) -> str | None:
    """What is missing for going on from `checkpoint` as if nothing had happened; `None` where nothing is."""
    folder = Path(checkpoint)
    if not (folder / TRAINER_STATE_FILE).is_file():
        return f"{TRAINER_STATE_FILE} is missing"
    reason = why_not_whole(folder)
    if reason is None and not any(next(folder.glob(name), None) for name in OPTIMIZER_STATES):
        # Trainer would go on with a fresh optimizer, without a word (transformers 5.23).
        return "it has no state of the optimizer, as with save_only_model=True"
    return reason


def checkpoint_to_resume(
    resume_from_checkpoint: str | bool | None, args: LeftTrainingArguments, has_trained: bool = False
) -> str | None:
    """The checkpoint that a run starts from, `None` for the beginning; room is made for a fresh run.

    Args:
        resume_from_checkpoint: As in `Trainer.train`; also the text `true`, as a flag gives it. `True` stands for the
            last whole checkpoint in `output_dir`, and for the beginning where there is none, so that a script that is
            started again and again comes to its end.
        args: Of the run.
        has_trained: Whether the checkpoints in `output_dir` are of an earlier call of the same trainer.

    Raises:
        FileExistsError: A fresh run, and `output_dir` holds a result or checkpoints of another.
        ValueError: The checkpoint that was named is not whole.
    """
    if str(resume_from_checkpoint).lower() == "true":
        return _last_whole_checkpoint(args)
    if resume_from_checkpoint:
        reason = why_not_resumable(str(resume_from_checkpoint))
        if reason:
            raise ValueError(
                f"resume_from_checkpoint={str(resume_from_checkpoint)!r} cannot be continued: {reason}. Pass another "
                "checkpoint, or True for the last whole one."
            )
        return str(resume_from_checkpoint)
    if not has_trained:
        check_room(args)
    if args.save_strategy != "no" and args.process_index == 0:
        # Left there, they would be what a later resume finds.
        for checkpoint in checkpoints_in(args.output_dir or ""):
            shutil.rmtree(checkpoint)
    return None


def _last_whole_checkpoint(args: LeftTrainingArguments) -> str | None:
    found = checkpoints_in(str(args.output_dir))
    for checkpoint in reversed(found):
        reason = why_not_resumable(checkpoint)
        if reason is None:
            logger.warning_once(f"Continuing from {checkpoint}.")
            return str(checkpoint)
        logger.warning(f"{checkpoint} is skipped: {reason}.")
    what = "no whole checkpoint" if found else "no checkpoint"
    logger.warning(f"output_dir={args.output_dir!r} holds {what}: the training starts from the beginning.")
    return None


def check_room(args: LeftTrainingArguments) -> None:
    """Raise `FileExistsError` where a fresh run would write over the result or among the checkpoints of another.

    A checkpoint that a kill has cut off is nothing to go on from, and does not count.
    """
    if args.overwrite_output_dir or args.resume_from_checkpoint:
        return
    folder = Path(args.output_dir or "")
    results = [name for name in RESULT_FILES if (folder / name).exists()]
    if args.save_strategy != "no":
        whole = [path.name for path in checkpoints_in(folder) if (path / TRAINER_STATE_FILE).is_file()]
        results += whole[-1:]
    if results:
        raise FileExistsError(
            f"output_dir={str(folder)!r} already holds {results[0]} of an earlier run. Continue it with "
            "train(resume_from_checkpoint=True) (--resume_from_checkpoint true), choose another directory, or replace "
            "it with overwrite_output_dir=True (--overwrite_output_dir)."
        )


def remove_old_checkpoints(run_dir: str | Path, limit: int | None, best: str | None) -> None:
    """Keep the last `limit` checkpoints, and the best one, as `Trainer` does; by number, whatever else is there.

    Args:
        run_dir: With the checkpoints.
        limit: `save_total_limit`; `None` or 0 keeps all.
        best: The best checkpoint, which stays.
    """
    checkpoints = checkpoints_in(run_dir)
    if not limit or limit < 0:
        return
    kept = {checkpoints[-1].name, *([Path(best).name] if best else [])} if checkpoints else set()
    for checkpoint in _oldest(checkpoints, kept, len(checkpoints) - max(limit, len(kept))):
        shutil.rmtree(checkpoint, ignore_errors=True)


def _oldest(checkpoints: list[Path], kept: set[str], number: int) -> Iterator[Path]:
    candidates = [checkpoint for checkpoint in checkpoints if checkpoint.name not in kept]
    yield from candidates[: max(0, number)]
