"""Cross-entropy of a linear output head without stored logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from left_trainer.kernels.cross_entropy_rows import cross_entropy_rows, has_kernel
from left_trainer.kernels.head_products import (
    LOW_PRECISION,
    SMALLEST_EXPONENT,
    HeadGradients,
    finish_logits,
    in_product_dtype,
    sum_dtype,
)
from left_trainer.token_mean import IGNORE_INDEX

DEFAULT_WORKSPACE_BYTES = 128 * 2**20
# On a CPU larger tiles leave the cache between their two products: in bfloat16 64 MiB took 1.6 times as long as 16 MiB.
MAX_CPU_TILE_BYTES = 16 * 2**20
# A tile narrower than this leaves the matrix product too little to do for each row that it reads.
MIN_TILE_WORDS = 1024


class TokenLoss(NamedTuple):
    """What an output head says about the target tokens of a batch.

    Args:
        loss_sum: Negative log-likelihood in nats, summed over the target tokens, a scalar; float32, or float64 for such
            inputs.
        n_tokens: Number of target tokens, a scalar.
        n_correct: Number of target tokens that have the largest logit, a scalar.
        losses: Of each target token, `(n_tokens,)`, without a gradient.
        is_target: Where they stand, in the shape of the labels.
    """

    loss_sum: torch.Tensor
    n_tokens: torch.Tensor
    n_correct: torch.Tensor
    losses: torch.Tensor
    is_target: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """Loss per target token; zero where there is none."""
        return self.loss_sum / self.n_tokens.clamp(min=1)

    @property
    def row_sums(self) -> torch.Tensor:
        """Losses summed over the target tokens of each row, `(batch,)`, without a gradient."""
        positions = torch.zeros_like(self.is_target, dtype=self.losses.dtype)
        return positions.masked_scatter(self.is_target, self.losses).sum(-1)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> TokenLoss:
    r"""Sum of the cross-entropy of $z = h W^\top + b$ over the rows that have a label, with its gradient.

    With a frozen head, the softmax is normalised online over tiles of the vocabulary (as attention is in
    FlashAttention, https://arxiv.org/abs/2205.14135), and the gradient

    $$\frac{\partial \ell}{\partial h} = \sum_{j \ne y} p_j W_j - (1 - p_y) W_y$$

    is accumulated in the same pass: each tile of logits is used twice while it is in the cache and then overwritten.
    A trained head, or label smoothing, needs the normalised probabilities themselves: there a tile is as wide as the
    vocabulary and holds as many rows as fit, 128 at 250,000 words and the default bound. On a GPU with Triton all tiles
    are that wide: one kernel turns logits into their gradient, in their own dtype.

    Under autocast the products are in autocast's dtype. Softmax and sums are in float32 for bfloat16 and float16.

    Args:
        hidden: Input of the head, `(..., hidden)`.
        weight: `(vocabulary, hidden)`.
        labels: `(...)`, with -100 where nothing is predicted; such rows are never multiplied.
        bias: `(vocabulary,)`.
        softcap: $c$ of $c \tanh(z / c)$, which then replaces $z$.
        label_smoothing: Part of the target distribution that is spread evenly over the vocabulary.
        workspace_bytes: Bound on the memory for logits. It is allocated once a call and used for all tiles. One row of
            logits is always allowed where a tile is as wide as the vocabulary.
    """
    hidden = in_product_dtype(hidden)
    valid = labels.ne(IGNORE_INDEX)
    loss_sum, n_correct, losses = _LinearCrossEntropy.apply(
        hidden[valid], weight, bias, labels[valid], softcap, label_smoothing, workspace_bytes, torch.is_grad_enabled()
    )
    return TokenLoss(loss_sum, valid.sum(), n_correct, losses, valid)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        softcap: float | None,
        label_smoothing: float,
        workspace_bytes: int,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wanted = [with_gradient and needed for needed in ctx.needs_input_grad[:3]]
        tiles = _Tiles(hidden, softcap, workspace_bytes)
        with torch.autocast(hidden.device.type, enabled=False):
            if wanted[1] or wanted[2] or label_smoothing or tiles.has_kernel:
                losses, n_correct, *gradients = _whole_rows(
                    hidden, weight, bias, labels, label_smoothing, tiles, wanted
                )
            else:
                losses, n_correct, gradient = _online(hidden, weight, bias, labels, tiles, wanted[0])
                gradients = [gradient, None, None]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(n_correct, losses)
        return losses.sum(), n_correct, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        # In place, because the weight's gradient is as large as the weight. autograd refuses a second pass by itself.
        scaled = (None if saved is None else saved.mul_(gradient.to(saved.dtype)) for saved in ctx.saved_tensors)
        return (*scaled, *[None] * 6)[:8]


class _Tiles:
    """One workspace for all tiles of logits of a call."""

    def __init__(self, hidden: torch.Tensor, softcap: float | None, workspace_bytes: int) -> None:
        dtype = hidden.dtype
        self.dtype, self.softcap, self.device = dtype, softcap, hidden.device
        self.has_kernel = has_kernel(hidden)
        self.sum_dtype = sum_dtype(dtype)
        self.item_bytes = self.sum_dtype.itemsize * (2 if softcap else 1)
        self.item_bytes += dtype.itemsize if dtype in LOW_PRECISION else 0
        if self.has_kernel:
            self.item_bytes = dtype.itemsize
        self.workspace_items = max(1, workspace_bytes // self.item_bytes)

    def allocate(self, rows: int, words: int) -> None:
        """Make room for tiles of up to `(rows, words)`."""
        dtype = self.dtype if self.has_kernel else self.sum_dtype
        self._logits = torch.empty(rows * words, dtype=dtype, device=self.device)
        self._slopes = torch.empty_like(self._logits) if self.softcap and not self.has_kernel else None
        self._rounded = None if self.dtype == dtype else torch.empty_like(self._logits, dtype=self.dtype)

    def logits(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        r"""Logits `(rows, words)`, overwritten by the next call, and with soft-capping their slopes $1 - \tanh^2$."""
        shape = (len(hidden), len(weight))
        logits = self._view(self._logits, shape)
        if self._rounded is None:
            torch.mm(hidden, weight.T, out=logits)
        else:
            logits.copy_(torch.mm(hidden, weight.T, out=self._view(self._rounded, shape)))
        slopes = None if self._slopes is None else self._view(self._slopes, shape)
        return finish_logits(logits, bias, self.softcap, slopes), slopes

    def cross_entropy(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        label_smoothing: float,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses and whether the target is the largest, `(rows,)`, and the logits' gradient, overwritten next time."""
        if self.has_kernel:
            tile = torch.mm(hidden, weight.T, out=self._view(self._logits, (len(hidden), len(weight))))
            losses, is_correct = cross_entropy_rows(tile, targets, bias, self.softcap, label_smoothing, with_gradient)
            return losses, is_correct, tile
        at = targets.unsqueeze(1)
        tile, slopes = self.logits(hidden, weight, bias)
        target_logits, largest = tile.gather(1, at), tile.amax(1, keepdim=True)
        expected = (1 - label_smoothing) * target_logits
        if label_smoothing:
            expected = expected + label_smoothing * tile.mean(1, keepdim=True)
        total = self.exponential(tile, largest).sum(1, keepdim=True)
        losses = (total.log() + largest - expected).squeeze(1)
        if with_gradient:
            tile.div_(total).sub_(label_smoothing / len(weight))
            tile.scatter_add_(1, at, torch.full_like(target_logits, label_smoothing - 1))
            if slopes is not None:
                tile.mul_(slopes)
        return losses, target_logits >= largest, tile

    def exponential(self, tile: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        r"""$e^{z - \max}$ in the place of $z$, without denormal numbers."""
        return tile.sub_(largest).clamp_(min=SMALLEST_EXPONENT[self.sum_dtype]).exp_()

    def rounded(self, tile: torch.Tensor) -> torch.Tensor:
        """`tile` in the dtype of the matrix products."""
        return tile if self._rounded is None else self._view(self._rounded, tuple(tile.shape)).copy_(tile)

    @staticmethod
    def _view(buffer: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return buffer[: shape[0] * shape[1]].view(shape)


def _online(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    tiles: _Tiles,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Losses `(rows,)`, number of correct rows and the gradient of `hidden`, over tiles of rows and words."""
    n_rows, n_words = len(hidden), len(weight)
    items = tiles.workspace_items
    if hidden.device.type == "cpu":
        items = min(items, MAX_CPU_TILE_BYTES // tiles.item_bytes)
    rows = max(1, min(n_rows, items // min(n_words, MIN_TILE_WORDS)))
    words = min(n_words, max(1, items // rows))
    tiles.allocate(rows, words)
    losses = hidden.new_empty(n_rows, dtype=tiles.sum_dtype)
    n_correct = labels.new_zeros(())
    gradient = torch.empty_like(hidden) if with_gradient else None
    for first in range(0, n_rows, rows):
        some, targets = hidden[first : first + rows], labels[first : first + rows]
        column = some.new_zeros(len(some), 1, dtype=tiles.sum_dtype)
        largest, others, target_logits = column - torch.inf, column.clone(), column.clone()
        product = torch.empty_like(some)
        weighted = torch.zeros_like(some, dtype=tiles.sum_dtype)
        for start in range(0, n_words, words):
            stop = min(start + words, n_words)
            tile_weight = weight[start:stop].to(tiles.dtype)
            tile, slopes = tiles.logits(some, tile_weight, None if bias is None else bias[start:stop])
            inside = ((targets >= start) & (targets < stop)).unsqueeze(1)
            at = (targets - start).clamp(0, stop - start - 1).unsqueeze(1)
            target_logits = torch.where(inside, tile.gather(1, at), target_logits)
            before, largest = largest, torch.maximum(largest, tile.amax(1, keepdim=True))
            tiles.exponential(tile, largest)
            # Without the target's own term, 1 - p_y is a sum and not a difference of nearly equal numbers.
            tile.scatter_(1, at, tile.gather(1, at).masked_fill(inside, 0))
            decay = (before - largest).exp()
            others = others * decay + tile.sum(1, keepdim=True)
            if with_gradient:
                if slopes is not None:
                    tile.mul_(slopes)
                weighted.mul_(decay).add_(torch.mm(tiles.rounded(tile), tile_weight, out=product))
        total = others + (target_logits - largest).exp()
        losses[first : first + rows] = (total.log() + largest - target_logits).squeeze(1)
        n_correct += (target_logits >= largest).sum()
        if gradient is not None:
            missing = others / total
            if tiles.softcap:
                missing = missing * (1 - (target_logits / tiles.softcap) ** 2)
            weighted.div_(total).addcmul_(missing, weight[targets].to(tiles.sum_dtype), value=-1)
            gradient[first : first + rows] = weighted
    return losses, n_correct, gradient


def _whole_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    label_smoothing: float,
    tiles: _Tiles,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Losses `(rows,)`, number of correct rows and the wanted gradients of `hidden`, `weight` and `bias`."""
    n_rows, n_words = len(hidden), len(weight)
    rows = max(1, min(n_rows, tiles.workspace_items // n_words))
    tiles.allocate(rows, n_words)
    losses = hidden.new_empty(n_rows, dtype=tiles.sum_dtype)
    n_correct = labels.new_zeros(())
    gradients = HeadGradients(hidden, weight, bias, wanted)
    for first in range(0, n_rows, rows):
        some = slice(first, first + rows)
        losses[some], is_correct, factor = tiles.cross_entropy(
            hidden[some], gradients.product_weight, bias, labels[some], label_smoothing, any(wanted)
        )
        n_correct += is_correct.sum()
        if any(wanted):
            gradients.add_to_bias(factor)
            gradients.add(some, tiles.rounded(factor))
    return losses, n_correct, *gradients.finished()
