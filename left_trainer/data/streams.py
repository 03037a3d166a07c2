"""Streamed rows of several processes: the same rows in a step, however many processes share it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from left_trainer.token_mean import IGNORE_INDEX


class WholeBatches(torch.utils.data.IterableDataset[dict[str, Any]]):
    """The rows of a stream in their order, and behind the last one rows without a target, up to a whole batch.

    Each process reads all rows and takes its own of each batch. Accelerate (1.15) would give each process files of its
    own where the stream has several, so that processes have other rows than one process, and not equally many; and fill
    the last batch with rows from the beginning, which would be trained on twice.

    Args:
        rows: Features, with `labels`.
        batch_size: Rows of all processes in a batch.
    """

    def __init__(self, rows: IterableDataset, batch_size: int) -> None:
        self.rows, self.batch_size = rows, batch_size

    def set_epoch(self, epoch: int) -> None:
        """Of the stream, which may be shuffled anew with each."""
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number, row = 0, None
        for row in self.rows:
            number += 1
            yield row
        if row is not None and "labels" in row:
            without_target = {**row, "labels": [IGNORE_INDEX] * len(row["labels"])}
            for _ in range(-number % self.batch_size):
                yield without_target


def stored(rows: Any) -> Any:
    """The rows of a stream in memory; other rows as they are.

    Several processes have to know which batch of an evaluation is the last one, and what fills it.
    """
    return Dataset.from_list(list(rows)) if isinstance(rows, IterableDataset) else rows
