"""Which rows make a batch: about equally long ones where the rows are text, and never padding that nobody needs."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from left_trainer.data.lengths import row_lengths
from left_trainer.data.sampling import POOL_STEPS, LengthGroupedSampler

N_ROWS = 203


@pytest.fixture(scope="module")
def lengths():
    """Of sources and targets that have nothing to do with each other."""
    return np.random.default_rng(0).integers(1, 100, (N_ROWS, 2))


def order(lengths, batch_size=4, batches_per_step=1, seed=0, epoch=0):
    return list(LengthGroupedSampler(lengths, batch_size, batches_per_step, seed, lambda: epoch))


def padded_share(lengths, rows, batch_size):
    batches = [lengths[rows[i : i + batch_size]] for i in range(0, len(rows), batch_size)]
    return 1 - lengths.sum(0) / sum(batch.max(0) * len(batch) for batch in batches)


@pytest.mark.parametrize("n_rows", [1, 3, 4, 8, 9, N_ROWS])
@pytest.mark.parametrize("batches_per_step", [1, 3])
def test_every_row_comes_once(n_rows, batches_per_step, lengths):
    assert sorted(order(lengths[:n_rows], batches_per_step=batches_per_step)) == list(range(n_rows))


def test_sources_and_targets_are_both_padded_little(lengths):
    random = padded_share(lengths, np.random.default_rng(1).permutation(N_ROWS), 4)
    grouped = padded_share(lengths, order(lengths), 4)
    assert all(grouped < 0.55 * random)


def test_the_longer_an_epoch_the_less_is_padded():
    lengths = np.random.default_rng(0).integers(1, 100, (8000, 2))
    random = padded_share(lengths, np.random.default_rng(1).permutation(8000), 4)
    by_sum = padded_share(lengths, lengths.sum(1).argsort(), 4)
    grouped = padded_share(lengths, order(lengths), 4)
    assert all(grouped < 0.25 * random)
    assert all(grouped < 0.5 * by_sum)


def test_a_short_epoch_has_several_kinds_of_rows_in_each_step():
    """Though the two kinds differ in length, by the one token that their labels differ in."""
    kinds = np.random.default_rng(0).integers(0, 2, 2400)
    lengths = np.stack([np.random.default_rng(1).normal(50, 8, 2400).astype(int), 4 + kinds], axis=1)
    steps = kinds[order(lengths, batch_size=16)].reshape(-1, 16).mean(axis=1)
    assert (np.abs(steps - 0.5) < 0.5).mean() > 0.98


def test_the_order_is_seeded_and_another_in_each_epoch(lengths):
    assert order(lengths) == order(lengths)
    assert order(lengths) != order(lengths, epoch=1)
    assert order(lengths) != order(lengths, seed=1)


def test_the_longest_batch_comes_first_and_the_others_are_shuffled(lengths):
    widths = lengths[order(lengths)][: N_ROWS // 4 * 4].reshape(-1, 4, 2).max(1).sum(1)
    assert widths[0] == widths.max()
    assert abs(np.corrcoef(widths[1:], np.arange(len(widths) - 1))[0, 1]) < 0.5


def test_processes_get_batches_of_about_the_same_width(lengths):
    rows = np.array(order(lengths, batch_size=4, batches_per_step=2)[: N_ROWS // 8 * 8])
    first, second = lengths[rows].reshape(-1, 2, 4, 2).max(2).sum(2).T
    assert np.abs(first - second).mean() < 0.5 * np.abs(first[1:] - second[:-1]).mean()


def test_a_step_has_the_same_rows_however_it_is_split(lengths):
    whole, split = (
        np.array(order(lengths, batch_size=size, batches_per_step=8 // size))[: N_ROWS // 8 * 8] for size in (8, 2)
    )
    assert (np.sort(whole.reshape(-1, 8)) == np.sort(split.reshape(-1, 8))).all()


def test_other_rows_meet_in_other_epochs():
    """Though no two rows are equally long: there are several pools, drawn at random."""
    lengths = np.arange(3 * POOL_STEPS * 2)[:, None]
    first, second = (
        {frozenset(pair) for pair in np.array(order(lengths, batch_size=2, epoch=epoch)).reshape(-1, 2).tolist()}
        for epoch in (0, 1)
    )
    assert len(first & second) < 0.5 * len(first)


def test_lengths_are_read_through_a_selection_of_rows():
    rows = Dataset.from_dict({"input_ids": [[1] * n for n in (3, 1, 2)], "labels": [[1], [1] * 5, []]})
    assert row_lengths(rows, ("input_ids", "labels")).tolist() == [[3, 1], [1, 5], [2, 0]]
    assert row_lengths(rows.select([2, 0]), ("input_ids",)).tolist() == [[2], [3]]
