"""What accelerate still does wrong, and left_trainer mends."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, prepare_data_loader, skip_first_batches
from accelerate.utils import concatenate
from datasets import IterableDataset
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from left_trainer.trainer.data_parallel import PREPARED
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


def test_the_rows_of_the_last_batch_are_not_known_once_batches_are_skipped():
    PartialState()
    rows = list(range(7))
    shard = BatchSamplerShard(BatchSampler(SequentialSampler(rows), 2, drop_last=False), num_processes=2)
    loader = DataLoaderShard(rows, batch_sampler=shard)
    remainders = []
    for each in (loader, skip_first_batches(loader, 1)):
        list(each)
        remainders.append(each.remainder)
    assert remainders == [3, -1], (
        f"accelerate now knows them: {home('rows_in_last_batch')} can go for the remainder of its gradient state."
    )


def test_a_stream_of_several_files_is_shared_by_files():
    PartialState()
    stream = IterableDataset.from_generator(
        lambda files: iter([{"file": file} for file in files for _ in range(file)]), gen_kwargs={"files": [3, 1]}
    )
    loaders = [
        prepare_data_loader(DataLoader(stream, batch_size=1), num_processes=2, process_index=index) for index in (0, 1)
    ]
    assert [len(list(loader)) for loader in loaders] == [3, 1], (
        "accelerate no longer gives each process files of its own, or makes up for their lengths: look whether "
        f"{home('WholeBatches')} is still needed."
    )


def test_a_model_that_was_prepared_for_an_evaluation_is_not_wrapped():
    model = Accelerator(cpu=True).prepare_model(torch.nn.Linear(1, 1), evaluation_mode=True)
    assert getattr(model, PREPARED, False), (
        "accelerate no longer takes a model that was evaluated for one that is wrapped for training: "
        f"{home('wrap_for_training')} can go."
    )
