"""Filling the cache of a teacher's best tokens before a training: which rows it lacks, how much they take, and they."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import torch

from left_trainer.compression.teacher_cache import Reading, TeacherCache, best_tokens, by_row
from left_trainer.compression.teacher_key import teacher_key, vocabulary_key
from left_trainer.evaluation.batches import batches_of_similar_length
from left_trainer.models import unwrapped, without_adapter
from left_trainer.storage.errors import WriteFailedError, shown_bytes
from left_trainer.trainer.telling import shown, tell
from left_trainer.training_args import LeftTrainingArguments


def filled_cache(trainer: Any) -> TeacherCache:
    """The teacher's best tokens at all targets of the training rows."""
    args, teaching = trainer.args, trainer.teaching
    options, teacher = teaching.options, teaching.teacher
    tokenizer = trainer.processing_class
    n_words = min(_n_words(unwrapped(trainer.model)), _n_words(teacher.model))
    k = min(options.cache_teacher, n_words)  # a vocabulary may have been trimmed
    key = {
        "teacher": teacher_key(teacher),
        "vocabulary": vocabulary_key(tokenizer),
        "temperature": options.temperature,
        "tokens": k,
        "words": n_words,
        "precision": trainer.accelerator.mixed_precision,
    }
    reading = Reading(trainer.family, None if tokenizer is None else tokenizer.pad_token_id)
    cache = TeacherCache(args.output_dir, key, k, n_words, reading)
    cache.open()
    loader = trainer.get_train_dataloader()
    rows = _Rows(loader.dataset, loader.collate_fn)
    missing = rows.missing(cache, args)
    trainer.accelerator.wait_for_everyone()  # else one may see what another has written, and share out fewer rows
    if missing:
        n_targets = sum(rows.n_targets[row] for row in missing)
        _check_room(args, cache, n_targets)
        batches = batches_of_similar_length(
            [rows.lengths[row] for row in missing],
            [rows.lengths[row] for row in missing],
            args.per_device_eval_batch_size,
        )
        own = [[missing[place] for place in batch] for batch in batches][args.process_index :: args.world_size]
        cache.write(
            args.process_index, (_said(trainer, cache, rows, batch) for batch in shown(args, own, "The teacher reads"))
        )
    trainer.accelerator.wait_for_everyone()
    cache.open()
    lost = sum(row not in cache for row in rows.digests)
    if lost:
        raise ValueError(
            f"{lost} of {len(rows.digests)} rows are not in {str(cache.folder)!r}. Let the data collator only fill "
            "rows up, and output_dir be on a disk that all processes share, or set cache_teacher=0."
        )
    return cache


class _Rows:
    """Training rows as a batch shows them.

    Args:
        dataset: Features.
        collate: To a batch.
    """

    def __init__(self, dataset: Any, collate: Any) -> None:
        self.dataset, self.collate = dataset, collate
        self.digests: list[bytes] = []
        self.lengths: list[int] = []
        self.n_targets: list[int] = []

    def batch(self, rows: Sequence[int]) -> dict[str, Any]:
        """Of some rows."""
        return dict(self.collate([self.dataset[row] for row in rows]))

    def missing(self, cache: TeacherCache, args: LeftTrainingArguments) -> list[int]:
        """Read all rows. Those that the cache does not have, one of each kind."""
        size = args.per_device_eval_batch_size
        for start in range(0, len(self.dataset), size):
            inputs = self.batch(range(start, min(start + size, len(self.dataset))))
            self.digests += cache.reading.digests(inputs)
            self.n_targets += cache.reading.targets(inputs["labels"]).sum(dim=1).tolist()
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
            self.lengths += mask.sum(dim=1).tolist()
        first = dict(zip(reversed(self.digests), reversed(range(len(self.digests))), strict=True))
        return sorted(row for digest, row in first.items() if digest not in cache)


def _said(trainer: Any, cache: TeacherCache, rows: _Rows, batch: Sequence[int]) -> list[Any]:
    """What the teacher says of some rows."""
    options = trainer.teaching.options
    inputs = trainer._prepare_inputs(rows.batch(batch))
    where = cache.reading.targets(inputs["labels"])
    with trainer.accelerator.autocast(), torch.no_grad():
        said = trainer.teaching.teacher.lesson(inputs).said
        best = best_tokens(said, where, cache.k, options.temperature, cache.n_words)
    return list(zip(cache.reading.digests(inputs), by_row(best, where), strict=True))


def _n_words(model: Any) -> int:
    """Words of an output head."""
    head = without_adapter(model).get_output_embeddings()
    return int(getattr(head, "out_features", None) or len(head.weight))


def _check_room(args: LeftTrainingArguments, cache: TeacherCache, n_targets: int) -> None:
    """Say how much the cache takes, and refuse it where the disk has not so much left."""
    needed = n_targets * cache.bytes_per_target
    free = shutil.disk_usage(args.output_dir).free
    what = f"The teacher's {cache.k} best tokens at {n_targets} targets take {shown_bytes(needed)}"
    if needed > free:
        raise WriteFailedError(
            f"{what} in {str(cache.folder)!r}, where {shown_bytes(free)} are free. Free space there, choose an "
            f"output_dir on another disk, or lower cache_teacher={cache.k}."
        )
    tell(args, f"{what} in {str(cache.folder)!r}; {shown_bytes(free)} are free.")
