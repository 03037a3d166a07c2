"""Checkpoints of a run: which are there and whole, going on from one, and removing old ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from left_trainer.storage.manifest import why_not_whole
from left_trainer.trainer.machines import of_first_process, on_every_machine
from left_trainer.training_args import LeftTrainingArguments

logger = logging.get_logger(__name__)

TRAINER_STATE_FILE = "trainer_state.json"
RESULT_FILES = (ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
# DeepSpeed and FSDP keep the optimizer's state in folders of their own.
OPTIMIZER_STATES = (OPTIMIZER_NAME, "optimizer.bin", "optimizer_*", "global_step*")
WEIGHTS = ("adapter_model*", "model*.safetensors", "pytorch_model*", "global_step*")
# Without these Trainer goes on with fresh ones, and says nothing.
STATES = {"scheduler.pt": ("scheduler.pt", "global_step*"), "rng_state.pth": ("rng_state*.pth",)}


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run from the first step to the last: folders `checkpoint-<number>`, and no links."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if NAME.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number in the name of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def why_not_loadable(checkpoint: str | Path) -> str | None:
    """Why the weights of `checkpoint` cannot be loaded; `None` where they can."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "there is no such folder"
    return why_not_whole(folder) or _missing(folder, {"weights": WEIGHTS})


def why_not_resumable(checkpoint: str | Path, needed: Sequence[str] = ()) -> str | None:
    """What is missing for going on from `checkpoint` as if nothing had happened; `None` where nothing is.

    Args:
        checkpoint: Path of the folder.
        needed: Further files, which the method goes on from.
    """
    folder = Path(checkpoint)
    if not (folder / TRAINER_STATE_FILE).is_file():
        return f"{TRAINER_STATE_FILE} is missing"
    reason = why_not_whole(folder)
    if reason is None and not any(next(folder.glob(name), None) for name in OPTIMIZER_STATES):
        # Trainer would go on with a fresh optimizer, without a word (transformers 5.23).
        return "it has no state of the optimizer, as with save_only_model=True"
    parts = {"weights": WEIGHTS, **STATES, **{name: (name,) for name in needed}}
    return reason or _missing(folder, parts) or _why_no_state(folder / TRAINER_STATE_FILE)


def _missing(folder: Path, parts: Mapping[str, Sequence[str]]) -> str | None:
    for part, names in parts.items():
        if not any(next(folder.glob(name), None) for name in names):
            return f"it has no {part}"
    return None


def _why_no_state(file: Path) -> str | None:
    state = json.loads(file.read_bytes())
    is_state = isinstance(state, dict) and isinstance(state.get("global_step"), int)
    return None if is_state else f"{file.name} is no state of a training"


def asks_to_resume(resume_from_checkpoint: str | os.PathLike[str] | bool | None) -> str | bool:
    """A path, `True` or `False`, which flags give as text."""
    if isinstance(resume_from_checkpoint, bool) or not resume_from_checkpoint:
        return bool(resume_from_checkpoint)
    text = os.fspath(resume_from_checkpoint)
    return text.lower() == "true" if text.lower() in ("true", "false") else text


def checkpoint_to_resume(
    resume_from_checkpoint: str | os.PathLike[str] | bool | None,
    args: LeftTrainingArguments,
    check: Callable[[str], None],
    needed: Sequence[str] = (),
    has_trained: bool = False,
) -> str | None:
    """The checkpoint that a run starts from, `None` for the beginning; room is made for a fresh run.

    The first process looks, and all go by what it finds, which is brought to the machines that do not have it.

    Args:
        resume_from_checkpoint: As in `Trainer.train`; also the texts `true` and `false`, as a flag gives them. `True`
            stands for the last whole checkpoint in `output_dir`, and for the beginning where there is none, so that a
            script that is started again and again comes to its end.
        args: Of the run.
        check: Raises `ValueError` for the checkpoint of another run.
        needed: Files that the method goes on from, beside those of every checkpoint.
        has_trained: Whether the checkpoints in `output_dir` are of an earlier call of the same trainer.

    Raises:
        FileExistsError: A fresh run, and `output_dir` holds a result or checkpoints of another.
        FileNotFoundError: There is no folder at the path.
        ValueError: The checkpoint that was named is not whole, or it is of another run.
    """
    found: str | Exception | None = None
    if args.process_index == 0:
        try:
            found = _checkpoint_to_resume(asks_to_resume(resume_from_checkpoint), args, needed, has_trained)
            if found:
                check(found)
                logger.warning_once(f"Continuing from {found}.")
        except (OSError, ValueError) as error:
            found = error
    found = of_first_process(found)
    if isinstance(found, Exception):
        raise found
    return on_every_machine(found, args)


def _checkpoint_to_resume(
    asked: str | bool, args: LeftTrainingArguments, needed: Sequence[str], has_trained: bool
) -> str | None:
    if asked is True:
        return _last_whole_checkpoint(args, needed)
    if asked:
        if not Path(asked).is_dir():
            raise FileNotFoundError(
                f"resume_from_checkpoint={asked!r} is not a folder. Pass the path of a checkpoint, or True for the "
                "last whole one in output_dir."
            )
        reason = why_not_resumable(asked, needed)
        if reason:
            raise ValueError(
                f"resume_from_checkpoint={asked!r} cannot be continued: {reason}. Pass another checkpoint, or True for "
                "the last whole one. To start a new run from its weights alone, pass the folder as model."
            )
        return asked
    if not has_trained:
        _check_no_result(args)
    if args.save_strategy != "no":
        # Left there, they would be what a later resume finds.
        for checkpoint in checkpoints_in(args.output_dir or ""):
            shutil.rmtree(checkpoint)
    return None


def _last_whole_checkpoint(args: LeftTrainingArguments, needed: Sequence[str]) -> str | None:
    found = checkpoints_in(str(args.output_dir))
    for checkpoint in reversed(found):
        reason = why_not_resumable(checkpoint, needed)
        if reason is None:
            return str(checkpoint)
        logger.warning_once(f"{checkpoint} is skipped: {reason}.")
    what = "no whole checkpoint" if found else "no checkpoint"
    logger.warning(f"output_dir={args.output_dir!r} holds {what}: the training starts from the beginning.")
    return None


def check_room(args: LeftTrainingArguments) -> None:
    """Raise `FileExistsError` where a fresh run would write over the result or among the checkpoints of another.

    For an early word: `train` checks the same. A run that is to resume is not fresh.
    """
    if not asks_to_resume(args.resume_from_checkpoint):
        _check_no_result(args)


def _check_no_result(args: LeftTrainingArguments) -> None:
    """A checkpoint that a kill has cut off is nothing to go on from, and does not count."""
    if args.overwrite_output_dir:
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


def remove_old_checkpoints(written: Path, limit: int | None, best: str | None) -> None:
    """Keep `limit` checkpoints, among them the one just written and the best one.

    Those of later steps, which are damaged or of before the run went back, go first, then those of the first steps.

    Args:
        written: The one just written.
        limit: `save_total_limit`; `None` or 0 keeps all.
        best: The best checkpoint.
    """
    if not limit or limit < 0:
        return
    checkpoints, kept = checkpoints_in(written.parent), {written.name, *([Path(best).name] if best else [])}
    others = [checkpoint for checkpoint in checkpoints if checkpoint.name not in kept]
    others.sort(key=lambda checkpoint: (step_of(checkpoint) < step_of(written), step_of(checkpoint)))
    n_kept = len(checkpoints) - len(others)
    for checkpoint in others[: len(others) - max(0, limit - n_kept)]:
        shutil.rmtree(checkpoint, ignore_errors=True)


def make_way(target: Path) -> None:
    """Keep a link or a file that is in the way of a checkpoint under another name: it is the user's."""
    if target.is_symlink() or target.is_file():
        kept = target.rename(target.with_name(f"{target.name}.kept-{uuid.uuid4().hex[:8]}"))
        logger.warning(f"{target} was in the way of a checkpoint, and is called {kept.name} now.")
