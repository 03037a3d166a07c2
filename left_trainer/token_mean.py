"""The training loss of an accumulated batch."""

from __future__ import annotations

import torch

IGNORE_INDEX = -100


def accumulated_token_loss(
    batch_mean: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None, num_processes: int
) -> torch.Tensor:
    r"""Turn the token mean of one micro-batch into its share of the token mean of the whole accumulated batch.

    With $n_b$ target tokens in micro-batch $b$, $N = \sum_b n_b$ over all micro-batches and ranks, and $\ell_b$ the
    mean over $n_b$ tokens, the share is $\ell_b n_b / N$. Ranks average their gradients, hence the factor
    `num_processes`.

    T5, BART and their relatives accept `num_items_in_batch` and ignore it, while `Trainer` then skips its own division
    (transformers 5.23): k accumulation steps multiply loss and gradients by k. This can go once their losses honour it.

    Args:
        batch_mean: Mean negative log-likelihood of the micro-batch's target tokens, a scalar.
        labels: `(batch, target)`, with -100 where nothing is predicted.
        num_items_in_batch: $N$; `None` outside of training, where the mean itself is wanted.
        num_processes: Number of ranks over which $N$ was summed; 1 when each rank counts its own.
    """
    return batch_mean * share_of_tokens(labels, num_items_in_batch, num_processes)


def share_of_tokens(
    labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None, num_processes: int
) -> torch.Tensor | float:
    """The part $n_b / N$ of the accumulated batch's target tokens that is in this micro-batch, times the ranks.

    Over the micro-batches of all ranks, whose gradients are averaged, it sums to 1. Arguments as in
    `accumulated_token_loss`.
    """
    if num_items_in_batch is None:
        return 1.0
    return labels.ne(IGNORE_INDEX).sum() / num_items_in_batch * num_processes
