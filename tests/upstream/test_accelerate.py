"""What accelerate still does wrong, and left_trainer mends."""

from __future__ import annotations

import pytest
import torch
from accelerate import PartialState
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, skip_first_batches
from accelerate.utils import concatenate
from torch.utils.data import BatchSampler, SequentialSampler

from package_walk import home


class EpochSampler(SequentialSampler):
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def test_a_sampler_does_not_hear_of_the_epoch_once_batches_are_skipped():
    PartialState()
    rows = list(range(16))
    sampler = EpochSampler(rows)
    shard = BatchSamplerShard(BatchSampler(sampler, 2, drop_last=False), num_processes=2, process_index=0)
    loader = DataLoaderShard(rows, batch_sampler=shard)
    loader.set_epoch(1)
    assert sampler.epoch == 1
    skip_first_batches(loader, 1).set_epoch(2)
    assert sampler.epoch == 1, (
        "accelerate now tells a sampler of its epoch when batches are skipped too: LengthGroupedSampler can have "
        f"set_epoch instead of the epoch that {home('length_grouped_sampler')} gives it."
    )


def test_batches_of_several_lengths_cannot_be_joined():
    """`DataLoaderDispatcher` joins those that the first process makes for the others."""
    batches = [{"input_ids": torch.zeros(2, length)} for length in (3, 4)]
    try:
        concatenate(batches, dim=0)
    except RuntimeError:
        return
    pytest.fail(
        f"accelerate now joins batches of several lengths: {home('with_own_batches')} can go where Trainer's default "
        "reads a stream as well."
    )
