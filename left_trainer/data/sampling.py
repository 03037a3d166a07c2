"""Batches of rows that are about equally long, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from left_trainer.models import ModelFamily

# Larger pools leave less padding. They also fill steps with rows of one kind, such as those of one label, which a short
# run does not recover from; docs/speed.md has the figures.
POOL_STEPS = 100
LEAST_POOL_STEPS = 8
POOLS = 16  # of an epoch, at least, where pools are smaller than POOL_STEPS
# What a batch pads: for decoder-only models prompt and completion are one sequence.
PADDED_COLUMNS: dict[ModelFamily, tuple[str, ...]] = {
    "encoder_decoder": ("input_ids", "labels"),
    "decoder_only": ("input_ids",),
}


class LengthGroupedSampler(Sampler[int]):
    """Rows in an order in which every batch has rows of about the same lengths, and batches come in random order.

    Rows are drawn into pools at random, of 8 steps in a short epoch and of 100 in a long one. A pool is halved, again
    and again, along the column whose lengths differ most in the part at hand, until a part is what one step reads. The
    step with the longest rows comes first in an epoch, so that a batch that does not fit into the memory shows at once.
    Rows that fill no step, others in each epoch, come last.

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
        pools = np.array_split(whole.reshape(n_steps, self.step_rows), -(-n_steps // pool_steps(n_steps)) or 1)
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


def pool_steps(n_steps: int) -> int:
    """Steps of a pool in an epoch of `n_steps`."""
    return min(POOL_STEPS, max(LEAST_POOL_STEPS, n_steps // POOLS))
