"""Batches of rows that are about equally long, so that little of a batch is padding."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import Trainer

from left_trainer.kernels.fast_paths import FastPath, first_reason
from left_trainer.models import ModelFamily
from left_trainer.training_args import LeftTrainingArguments

GROUP_BY_LENGTH = "group_by_length"
POOL_STEPS = 100  # more leave less padding and less chance in which rows meet; benchmarks/NOTES.md has the figures
ARROW_ROWS = 10_000
# What a batch pads: for decoder-only models prompt and completion are one sequence.
PADDED_COLUMNS: dict[ModelFamily, tuple[str, ...]] = {
    "encoder_decoder": ("input_ids", "labels"),
    "decoder_only": ("input_ids",),
}


class LengthGroupedSampler(Sampler[int]):
    """Rows in an order in which every batch has rows of about the same lengths, and batches come in random order.

    Rows are drawn into pools at random. A pool is halved, again and again, along the column whose lengths differ most
    in the part at hand, until a part is what one step reads. The step with the longest rows comes first in an epoch, so
    that a batch that does not fit into the memory shows at once. Rows that fill no step, others in each epoch, come
    last.

    Args:
        lengths: In tokens, `(rows, columns)`: of sources and targets, or of whole sequences.
        batch_size: Rows that are padded together.
        batches_per_step: Of all processes and of all accumulated micro-batches. The rows of a step are the same however
            they are split.
        seed: Of the order.
        epoch: Tells the current epoch, which has an order of its own.
    """

    def __init__(
        self, lengths: NDArray[np.int64], batch_size: int, batches_per_step: int, seed: int, epoch: Callable[[], int]
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.step_rows = batch_size * batches_per_step
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch()))
        rows = generator.permutation(len(self.lengths))
        n_steps = len(rows) // self.step_rows
        whole, rest = np.split(rows, [n_steps * self.step_rows])
        pools = np.array_split(whole.reshape(n_steps, self.step_rows), -(-n_steps // POOL_STEPS) or 1)
        steps = [step for pool in pools for step in self._alike(pool.reshape(-1), self.step_rows)]
        generator.shuffle(steps)
        longest = max(range(len(steps)), key=lambda number: self._width(steps[number]))
        for step in (steps.pop(longest), *steps, rest):
            for batch in self._alike(step, self.batch_size):
                yield from batch.tolist()

    def _alike(self, rows: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
        """`rows` in parts of `size`, the last one perhaps smaller."""
        n_parts = -(-len(rows) // size)
        if n_parts < 2:
            return [rows]
        lengths = self.lengths[rows]
        column = np.ptp(lengths, axis=0).argmax()
        halves = np.split(rows[lengths[:, column].argsort(kind="stable")], [n_parts // 2 * size])
        return [part for half in halves for part in self._alike(half, size)]

    def _width(self, rows: NDArray[np.int64]) -> int:
        """Tokens of a row of the batch, padding included."""
        return int(self.lengths[rows].max(axis=0, initial=0).sum())


def row_lengths(dataset: Dataset, columns: Sequence[str]) -> NDArray[np.int64]:
    """Number of tokens of each row in each column, `(rows, columns)`, from Arrow's offsets: no token is read."""
    tables = dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=ARROW_ROWS)
    parts = [
        np.stack([table[column].combine_chunks().value_lengths().to_numpy() for column in columns], axis=1)
        for table in tables
    ]
    return np.concatenate(parts).astype(np.int64)


class BatchingMixin(Trainer):
    """Which rows make a batch: for text, and when asked for, equally long ones; in generation, never joined ones."""

    args: LeftTrainingArguments
    family: ClassVar[ModelFamily]
    fast_paths: dict[str, FastPath]
    data_collator: Any
    _rows_are_text = False

    def settle_batches(self, train_dataset: Any, args: LeftTrainingArguments) -> None:
        """Look at the rows before they are tokenized, and keep those apart that prompts are generated from."""
        self._rows_are_text = "input_ids" not in (getattr(train_dataset, "column_names", None) or ())
        if args.packing and args.predict_with_generate and args.eval_packing is None:
            args.eval_packing = False

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in `Trainer`; notes for the report whether the batches are grouped."""
        self.fast_paths[GROUP_BY_LENGTH].record(self._why_not_grouped(self.train_dataset))
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As in `Trainer`; where text is generated, with a row for each prompt."""
        with self._one_row_for_each_prompt():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As in `Trainer`; where text is generated, with a row for each prompt."""
        with self._one_row_for_each_prompt():
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _one_row_for_each_prompt(self) -> Iterator[None]:
        """Inside, TRL's collator does not join the rows of a batch into one, as it does with `packing`."""
        collator = self.data_collator
        if self.args.predict_with_generate and getattr(collator, "padding_free", False):
            self.data_collator = dataclasses.replace(collator, padding_free=False)
        try:
            yield
        finally:
            self.data_collator = collator

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self._why_not_grouped(dataset) is not None:
            return super()._get_train_sampler(train_dataset)
        args = self.args
        return LengthGroupedSampler(
            row_lengths(dataset, PADDED_COLUMNS[self.family]),
            self._train_batch_size,
            args.world_size * args.gradient_accumulation_steps,
            args.seed if args.data_seed is None else args.data_seed,
            # Not through set_epoch: on several processes, accelerate 1.15 hands it on to its own samplers alone once it
            # skips the batches before a checkpoint, and the resumed epoch would have the order of the first.
            epoch=lambda: int(self.state.epoch or 0),
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        # Trainer would permute evaluation rows too: predictions would no longer be in the order of their rows.
        if self.args.train_sampling_strategy != GROUP_BY_LENGTH:
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset) if self.args.world_size == 1 else None

    def _why_not_grouped(self, dataset: Any) -> str | None:
        args, strategy = self.args, self.args.train_sampling_strategy
        unset = strategy is None
        reasons = {
            f"train_sampling_strategy={strategy!r}": strategy not in (None, GROUP_BY_LENGTH),
            "the trainer has a sampler of its own": (
                type(self)._get_train_sampler is not BatchingMixin._get_train_sampler
            ),
            f"the rows are in a {type(dataset).__name__}": not isinstance(dataset, Dataset),
            "the rows were given as tokens": unset and not self._rows_are_text,
            "packing=True": unset and args.packing,
            "padding_free=True": unset and args.padding_free,
            "the rows have no input_ids": "input_ids" not in (getattr(dataset, "column_names", None) or ()),
        }
        return first_reason(reasons)
