"""What a teacher says once, before a training: the targets that it writes, and its best tokens at those of the data.

Both are in `output_dir` and go on where a killed run has stopped. Afterwards no step needs the teacher, whose weights
are released.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

from accelerate.utils import gather_object

from left_trainer.compression.kept_targets import KeptTargets
from left_trainer.compression.teacher_targets import TargetWriter, Writing, longest_answer, with_targets
from left_trainer.interrupts import TERMINATED, handling, interrupted, leave_to_default, say
from left_trainer.trainer.features import tell_cuts
from left_trainer.trainer.filled_cache import filled_cache
from left_trainer.trainer.machines import of_first_process
from left_trainer.trainer.telling import shown, tell
from left_trainer.training_args import LeftTrainingArguments


def keep_answers(trainer: Any) -> None:
    """Let the teacher say what is kept of it, where `distillation_kwargs` ask for that and it is not there yet.

    Args:
        trainer: Before its training, with the lock of `output_dir`. Its `train_dataset` may become another.

    Raises:
        WriteFailedError: There is no room on the disk.
        KeyboardInterrupt: After Ctrl-C; `SystemExit` after SIGTERM. What was said until then is kept.
    """
    teaching = trainer.teaching
    if teaching is None or teaching.answers_are_kept or trainer.train_dataset is None:
        return
    options = teaching.options
    with stopping_at_once(trainer.args):
        if options.sequence_level:
            train_on_targets(trainer)
        if options.cache_teacher and teaching.is_on:
            teaching.cache = filled_cache(trainer)
    teaching.answers_are_kept = True
    if (options.sequence_level and not options.runs_teacher) or teaching.cache is not None:
        teaching.teacher.release()


@contextlib.contextmanager
def stopping_at_once(args: LeftTrainingArguments) -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM end the program with a line, as there is no step to wait for."""
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        leave_to_default(number, owner)
        if os.getpid() != owner:
            return
        if args.process_index == 0:
            say(f"\n{signal.Signals(number).name}: what the teacher has said is kept. Start the same again to go on.\n")
        raise interrupted() if number == signal.SIGINT else SystemExit(TERMINATED)

    end.is_of_left_trainer = True  # type: ignore[attr-defined]
    handled = [signal.SIGINT, *([] if args.enable_jit_checkpoint else [signal.SIGTERM])]
    with handling(dict.fromkeys(handled, end) if args.save_on_signal else {}):
        yield


def train_on_targets(trainer: Any) -> None:
    """Put what the teacher writes in the place of the targets of the training rows."""
    args, rows, options = trainer.args, trainer.request.train_dataset, trainer.teaching.options
    teacher = trainer.teaching.teacher
    longest = args.generation_max_length or longest_answer(rows["completion"], teacher.tokenizer)
    how = Writing(longest, options.num_beams, args.max_length, args.truncation_mode)
    writer = TargetWriter(teacher, how, args.device)
    ids = writer.encode(rows["prompt"])
    kept = KeptTargets(args.output_dir, writer.key(ids))
    texts = of_first_process(kept.read() if args.process_index == 0 else None)
    missing = [row for row in range(len(rows)) if row not in texts]
    if missing:
        tell(args, f"The teacher writes the targets of {len(missing)} of {len(rows)} rows into {str(kept.path)!r}.")
        texts |= _written(trainer, writer, kept, {row: ids[row] for row in missing})
    if args.process_index == 0 and not kept.path.is_file():
        kept.finish(texts)
    trainer.accelerator.wait_for_everyone()
    replaced, n_empty = with_targets(rows, [texts[row] for row in range(len(rows))])
    if n_empty:
        tell(args, f"The teacher has answered nothing to {n_empty} of {len(rows)} rows, which keep their own target.")
    if trainer.features_given is None:
        trainer.features_given = trainer.train_dataset  # by which a checkpoint knows its run
    trainer.train_dataset = trainer._features(replaced, trainer.processing_class, args, "train")
    tell_cuts(trainer, "train")


def _written(trainer: Any, writer: TargetWriter, kept: KeptTargets, prompts: Mapping[int, list[int]]) -> dict[int, str]:
    """The teacher's answers by row, of which each process writes a share."""
    args, rows = trainer.args, list(prompts)
    batches = writer.batches(list(prompts.values()), args.per_device_eval_batch_size)
    own: dict[int, str] = {}
    with kept.appending(args.process_index) as append, trainer.accelerator.autocast():
        for batch in shown(args, batches[args.process_index :: args.world_size], "The teacher writes"):
            places = [rows[position] for position in batch]
            texts = dict(zip(places, writer.answer([prompts[row] for row in places]), strict=True))
            append(texts)
            own |= texts
    return dict(gather_object(list(own.items())))
