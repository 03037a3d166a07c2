"""Which rows make a batch: for text, and when asked for, equally long ones; in generation, never joined ones."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler, SequentialSampler

from left_trainer.data.dataset_types import is_lazy
from left_trainer.data.lengths import row_lengths
from left_trainer.data.sampling import PADDED_COLUMNS, LengthGroupedSampler
from left_trainer.data.streams import WholeBatches, stored
from left_trainer.kernels.fast_paths import first_reason
from left_trainer.models import ModelFamily
from left_trainer.token_mean import IGNORE_INDEX
from left_trainer.training_args import LeftTrainingArguments

GROUP_BY_LENGTH = "group_by_length"
# In a batch whose rows are joined into one: how many tokens each of them has. Taken out before the model is called.
JOINED_LENGTHS = "joined_lengths"


class BatchingHost(Protocol):
    """What batching needs of a trainer."""

    args: LeftTrainingArguments
    family: ModelFamily
    state: Any
    data_collator: Any
    rows_were_text: bool
    has_own_sampler: bool
    _train_batch_size: int


def length_grouped_sampler(trainer: BatchingHost, dataset: Dataset) -> LengthGroupedSampler:
    """The sampler of rows for which `why_not_grouped` is `None`."""
    args = trainer.args
    return LengthGroupedSampler(
        row_lengths(dataset, PADDED_COLUMNS[trainer.family]),
        trainer._train_batch_size,
        args.world_size * args.gradient_accumulation_steps,
        args.seed if args.data_seed is None else args.data_seed,
        # Not through set_epoch: on several processes, accelerate 1.15 hands it on to its own samplers alone once it
        # skips the batches before a checkpoint, and the resumed epoch would have the order of the first.
        epoch=lambda: int(trainer.state.epoch or 0),
    )


def sequential_sampler(args: LeftTrainingArguments, dataset: Any) -> Sampler[int] | None:
    """The order in which `group_by_length` leaves evaluation rows.

    `Trainer` would permute them too: predictions would no longer be in the order of their rows.
    """
    return SequentialSampler(dataset) if args.world_size == 1 else None


def with_own_batches(args: LeftTrainingArguments, dataset: Any) -> LeftTrainingArguments:
    """Arguments with which each process makes its batches of a stream itself, as `SFTTrainer` has it.

    By default the first process makes all of them, and fails to join those of different lengths (accelerate 1.15).
    """
    config = args.accelerator_config
    if not isinstance(dataset, IterableDataset) or config.dispatch_batches is not None or config.split_batches:
        return args
    return args.replaced(accelerator_config=dataclasses.replace(config, dispatch_batches=False))


def check_batches_can_be_joined(args: LeftTrainingArguments) -> None:
    """Refuse `dispatch_batches`, with which the first process joins batches of several lengths for the others."""
    if args.world_size > 1 and args.accelerator_config.dispatch_batches:
        raise ValueError(
            f"accelerator_config has dispatch_batches=True: the first of {args.world_size} processes would join batches"
            " of different lengths, and fail. Leave it out: each process takes its own rows, of a stream too."
        )


def shared_by_processes(args: LeftTrainingArguments, dataset: Any, batch_size: int, trains: bool) -> Any:
    """`dataset` as several processes read it together: a stream in whole batches, one that is evaluated from memory.

    Args:
        args: Of the trainer.
        dataset: Features.
        batch_size: Rows of one process in a batch.
        trains: Whether it is trained on.
    """
    if args.world_size == 1 or not isinstance(dataset, IterableDataset):
        return dataset
    if not trains:
        return stored(dataset)
    return WholeBatches(dataset, batch_size if args.accelerator_config.split_batches else batch_size * args.world_size)


def rows_in_last_batch(loader: Any) -> int:
    """How many rows the last batch of all processes has of its own; 0 where nothing fills it up.

    Accelerate's own number is lost when batches before a checkpoint are skipped (accelerate 1.15).
    """
    shard = getattr(loader, "batch_sampler", None)
    if not isinstance(shard, BatchSamplerShard) or shard.drop_last or not shard.even_batches or not shard.batch_size:
        return 0
    total = shard.batch_size * (1 if shard.split_batches else shard.num_processes)
    sampler = getattr(shard.batch_sampler, "sampler", ())
    return len(sampler) % total if shard.num_processes > 1 else 0


def without_repeated_rows(args: LeftTrainingArguments, inputs: dict[str, Any], n_rows: int) -> dict[str, Any]:
    """The last batch of this process without targets in the rows that another process has too.

    Several processes fill their last batches with rows from the beginning.

    Args:
        args: Of the trainer.
        inputs: The batch.
        n_rows: Of the last batch of all processes, those that do not fill it up; less than 1 where nothing does.
    """
    labels = inputs.get("labels")
    if args.world_size == 1 or n_rows < 1 or labels is None:
        return inputs
    labels, lengths = labels.clone(), inputs.get(JOINED_LENGTHS)
    n_own = max(0, n_rows - args.process_index * len(labels if lengths is None else lengths))
    if lengths is None:
        labels[n_own:] = IGNORE_INDEX
    else:
        labels[:, int(lengths[:n_own].sum()) :] = IGNORE_INDEX
    return {**inputs, "labels": labels}


def were_text(dataset: Any) -> bool:
    """Whether the rows that a user gave hold text, and not tokens."""
    return "input_ids" not in (getattr(dataset, "column_names", None) or ())


def why_not_grouped(trainer: BatchingHost, dataset: Any) -> str | None:
    """Why training rows of similar length are not put together; `None` where they are."""
    args, strategy = trainer.args, trainer.args.train_sampling_strategy
    unset = strategy is None
    reasons = {
        f"train_sampling_strategy={strategy!r}": strategy not in (None, GROUP_BY_LENGTH),
        "the trainer has a sampler of its own": trainer.has_own_sampler,
        f"the rows are in a {type(dataset).__name__}": not isinstance(dataset, Dataset),
        "the rows are computed when they are read": is_lazy(dataset),
        "the rows were given as tokens": unset and not trainer.rows_were_text,
        "packing=True": unset and args.packing,
        "padding_free=True": unset and args.padding_free,
        "the rows have no input_ids": "input_ids" not in (getattr(dataset, "column_names", None) or ()),
    }
    return first_reason(reasons)


@contextlib.contextmanager
def lengths_of_joined_rows(trainer: BatchingHost) -> Iterator[None]:
    """Inside, several processes are given a collator that tells where the rows end that it joins into one."""
    collator = trainer.data_collator

    def telling(rows: list[Any]) -> Any:
        batch = collator(rows)
        if isinstance(batch, Mapping) and batch.get("labels") is not None and len(batch["labels"]) < len(rows):
            return {**batch, JOINED_LENGTHS: torch.tensor([len(row["input_ids"]) for row in rows])}
        return batch

    trainer.data_collator = telling if trainer.args.world_size > 1 else collator
    try:
        yield
    finally:
        trainer.data_collator = collator


@contextlib.contextmanager
def one_row_for_each_prompt(trainer: BatchingHost) -> Iterator[None]:
    """Inside, TRL's collator does not join the rows of a batch into one, as it does with `packing`."""
    collator = trainer.data_collator
    if trainer.args.predict_with_generate and getattr(collator, "padding_free", False):
        trainer.data_collator = dataclasses.replace(collator, padding_free=False)
    try:
        yield
    finally:
        trainer.data_collator = collator
