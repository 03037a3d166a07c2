"""The loss of an evaluation: nats per target token, whatever the batches."""

from __future__ import annotations

import math

import torch
from accelerate.utils import gather_object


class TokenMeanLoss:
    r"""Mean over the target tokens of all batches and processes.

    With the mean $\ell_b$ of a batch over its $n_b$ target tokens, it is $\sum_b n_b \ell_b / \sum_b n_b$. `Trainer`
    weighs batches by their number of places, so that its mean depends on how rows meet in them.
    """

    def __init__(self) -> None:
        self._means: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []

    def add(self, mean: torch.Tensor, n_tokens: torch.Tensor) -> None:
        """A batch of this process: its mean loss and its number of target tokens, both scalars."""
        self._means.append(mean.detach())
        self._counts.append(n_tokens)

    @property
    def is_empty(self) -> bool:
        return not self._means

    def value(self, skip_non_finite: bool) -> float | None:
        """The mean of all processes, each of which has to ask for it; `None` where there was no target token.

        Args:
            skip_non_finite: Leave out batches whose loss is not finite, if any is (`logging_nan_inf_filter`).
        """
        own = [
            (mean, count)
            for mean, count in zip(_on_host(self._means), _on_host(self._counts), strict=True)
            if count > 0
        ]
        batches = gather_object(own)
        finite = [batch for batch in batches if math.isfinite(batch[0])]
        counted = finite if skip_non_finite and finite else batches
        n_tokens = math.fsum(count for _, count in counted)
        return math.fsum(mean * count for mean, count in counted) / n_tokens if n_tokens else None


def _on_host(values: list[torch.Tensor]) -> list[float]:
    return torch.stack(values).tolist() if values else []
