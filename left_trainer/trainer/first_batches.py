"""The first training batches, of which a method makes its start: the rows of all processes, in each of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed

from left_trainer.models import unwrapped
from left_trainer.token_mean import IGNORE_INDEX
from left_trainer.trainer.machines import copy_from_first

FILLED_WITH = {"labels": IGNORE_INDEX}


def initialize_from_all_rows(trainer: Any) -> None:
    """Set the weights of a new adapter of `trainer`, from the same rows and to the same values in every process."""
    model = unwrapped(trainer.model)
    if trainer.hooks.initialize(model, functools.partial(batches_of_all, trainer), trainer.args.seed):
        # Each has computed them, maybe on other hardware.
        copy_from_first([*model.parameters(), *model.buffers()], trainer.args.device)


def batches_of_all(trainer: Any, number: int) -> Iterator[dict[str, torch.Tensor]]:
    """The first `number` batches of the present epoch, each with the rows of all processes, as one process has them.

    Args:
        trainer: That reads them.
        number: Of batches of one process.

    Yields:
        Batches of all rows; where rows are joined into one, and cannot be filled up, a batch for each process.
    """
    for batch in trainer._first_batches(number):
        yield from [batch] if trainer.args.world_size == 1 else _of_all(trainer, batch)


def _of_all(trainer: Any, batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    accelerator = trainer.accelerator
    if "attention_mask" not in batch:
        return [_moved(each, trainer.args.device) for each in _gathered(batch)]
    pad = getattr(trainer.processing_class, "pad_token_id", None)
    filled = {**FILLED_WITH, "input_ids": pad or 0}
    wide = {
        name: accelerator.pad_across_processes(tensor.contiguous(), dim=1, pad_index=filled.get(name, 0))
        for name, tensor in batch.items()
    }
    joined = {name: accelerator.gather(tensor) for name, tensor in wide.items()}
    kept = _own_rows(accelerator.gradient_state, joined)
    return [{name: tensor[kept] for name, tensor in joined.items()}]


def _own_rows(state: Any, joined: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which rows of a batch of all processes fill up the last one."""
    number = len(joined["input_ids"])
    kept = torch.ones(number, dtype=torch.bool, device=joined["input_ids"].device)
    if not state.end_of_dataloader:
        return kept
    if state.remainder > 0:
        kept[state.remainder :] = False
    elif "labels" in joined and state.remainder < 0:  # of a stream, whose length is not known
        kept = joined["labels"].ne(IGNORE_INDEX).any(dim=1)
    return kept


def _gathered(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The batches of all processes, which need not have the same shapes."""
    batches: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(batches, _moved(batch, torch.device("cpu")))
    return batches


def _moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
