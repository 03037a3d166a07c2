"""Rows of like length in one batch, and results of different lengths on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from left_trainer.token_mean import IGNORE_INDEX

MAX_WIDENING = 4  # of a batch of short rows: what a row takes whatever its length, its logits, is not counted


def why_not_reordered(dataloader: DataLoader[Any]) -> str | None:
    """Why the rows behind `dataloader` cannot be read in another order first; `None` where they can."""
    if isinstance(dataloader.dataset, IterableDataset):
        return "the dataset is streamed"
    sampler = dataloader.batch_sampler
    sampler = getattr(sampler, "batch_sampler", sampler)  # inside of what gives each process its batches
    is_sequential = isinstance(getattr(sampler, "sampler", None), SequentialSampler)
    if not is_sequential or isinstance(dataloader, DataLoaderDispatcher):
        return "the dataloader does not read the rows in their order"
    if "input_ids" not in dataloader.dataset[0]:
        return "the rows have no input_ids"
    return None


def batches_of_similar_length(lengths: Sequence[int], widths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions of rows, the longest first, in batches that need no more memory than `batch_size` of the widest rows.

    Args:
        lengths: Of each row, in tokens: rows with like ones are put together.
        widths: Tokens that each row holds in memory. A batch is padded to its widest row, and holds at most as many
            tokens as `batch_size` of the widest, so that short rows form larger batches.
        batch_size: Least number of rows of a batch; only the last one may have fewer.
    """
    most_tokens = batch_size * max(widths, default=0)
    batches: list[list[int]] = []
    width = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        rows = len(batches[-1]) + 1 if batches else 0
        wider = max(width, widths[row])
        if not batches or (rows > batch_size and rows * wider > most_tokens) or rows > MAX_WIDENING * batch_size:
            batches.append([])
            wider = widths[row]
        batches[-1].append(row)
        width = wider
    return batches


def without_filling(tokens: np.ndarray, eos_token_ids: Sequence[int], pad_token_id: int) -> np.ndarray:
    """Generated ids `(sequence,)` up to the row's own end.

    What follows is filled with `pad_token_id`, or, by beam search where that is 0, with the end of sequence
    (transformers 5.23). The first id is kept in any case: with it a decoder starts, and it may be either of the two.
    """
    kept = np.flatnonzero(~np.isin(tokens, (pad_token_id, *eos_token_ids)))
    length = int(kept[-1]) + 1 if len(kept) else 1
    has_end = length < len(tokens) and tokens[length] in eos_token_ids
    return tokens[: length + has_end]


def join_batches(batches: Any) -> Any:
    """`(rows, longest)` of a list of arrays `(batch, sequence)`, filled with -100; anything else as it is."""
    if not isinstance(batches, list):
        return batches
    if batches[0].ndim == 1:
        return np.concatenate(batches)
    shape = sum(map(len, batches)), max(batch.shape[1] for batch in batches)
    joined = np.full(shape, IGNORE_INDEX, dtype=batches[0].dtype)
    start = 0
    for batch in batches:
        joined[start : start + len(batch), : batch.shape[1]] = batch
        start += len(batch)
    return joined


def pad_rows(rows: Sequence[np.ndarray], pad_token_id: int, device: torch.device) -> torch.Tensor:
    """Rows of token ids as one tensor `(batch, longest)`."""
    tensors = [torch.from_numpy(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad_token_id).to(device)
