"""What a trainer reads: the columns of its rows, their order, and how they make a batch."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from left_trainer.data.dataset_types import is_lazy, only_columns
from left_trainer.kernels.fast_paths import FastPath
from left_trainer.models import unwrapped
from left_trainer.trainer import batching
from left_trainer.trainer.columns import with_columns_for, with_task_column, with_task_ids
from left_trainer.trainer.evaluation import GeneratingTrainer
from left_trainer.trainer.on_policy import with_own_texts
from left_trainer.training_args import LeftTrainingArguments


class ReadingTrainer(GeneratingTrainer):
    """A trainer that generates in evaluations, and reads rows of any kind in an order of its own."""

    rows_were_text: bool
    _signature_columns: list[str] | None

    @functools.cached_property
    def fast_paths(self) -> dict[str, FastPath]:
        """What ran and what fell back, by name; `training_report.json` shows it."""
        return defaultdict(FastPath)

    @property
    def has_own_sampler(self) -> bool:
        """Whether a subclass chooses the order of the training rows."""
        return type(self)._get_train_sampler is not ReadingTrainer._get_train_sampler

    def _collator(self, given: Any, tokenizer: Any, args: LeftTrainingArguments) -> Any:
        return given

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        if not is_lazy(dataset):
            return super()._remove_unused_columns(dataset, description)
        self._set_signature_columns_if_needed()
        columns = self._signature_columns if self.args.remove_unused_columns else None
        return only_columns(dataset, columns) if columns else dataset

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if batching.JOINED_LENGTHS in inputs:
            inputs = {name: value for name, value in inputs.items() if name != batching.JOINED_LENGTHS}
        return super()._prepare_inputs(with_task_ids(unwrapped(self.model), inputs))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = with_task_column(unwrapped(self.model), self._signature_columns)
        self._signature_columns = with_columns_for(self.request.data_collator, unwrapped(self.model), columns)

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args: Any, is_training: bool = False, **kwargs: Any
    ) -> Any:
        dataset = batching.shared_by_processes(self.args, dataset, batch_size, is_training)
        with batching.lengths_of_joined_rows(self):
            return super()._get_dataloader(dataset, description, batch_size, *args, is_training=is_training, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in `Trainer`; notes for the report whether the batches are grouped."""
        self.fast_paths[batching.GROUP_BY_LENGTH].record(batching.why_not_grouped(self, self.train_dataset))
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As in `Trainer`; where text is generated, with a row for each prompt."""
        with batching.one_row_for_each_prompt(self):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As in `Trainer`; where text is generated, with a row for each prompt."""
        with batching.one_row_for_each_prompt(self):
            return super().get_test_dataloader(test_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """As in `Trainer`; in some steps with what the student has written in the place of the targets.

        What fills up the last batch of several processes is not trained on.
        """
        batches, number = super().get_batch_samples(map(self._to_train_on, epoch_iterator), num_batches, device)
        written = with_own_texts(self, batches)
        return (batches, number) if written is None else (written, self._get_num_items_in_batch(written, device))

    def _to_train_on(self, batch: Any) -> Any:
        # A process that counts its own tokens alone needs some.
        if not self.accelerator.gradient_state.end_of_dataloader or not self.args.average_tokens_across_devices:
            return batch
        n_rows = batching.rows_in_last_batch(self.callback_handler.train_dataloader)
        return batching.without_repeated_rows(self.args, batch, n_rows)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if batching.why_not_grouped(self, dataset) is None:
            return batching.length_grouped_sampler(self, dataset)
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        if self.args.train_sampling_strategy == batching.GROUP_BY_LENGTH:
            return batching.sequential_sampler(self.args, eval_dataset)
        return super()._get_eval_sampler(eval_dataset)
