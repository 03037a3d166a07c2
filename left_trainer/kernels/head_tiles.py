"""Tiles of logits as wide as the vocabulary: a few rows at a time, and blocks of them that fit into the cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from left_trainer.kernels.divergence import TopTokens
from left_trainer.kernels.head_products import finish_logits, in_product_dtype

# On a CPU a product with so many words of the weight at a time takes 0.6 to 0.9 of the time of one with all of them.
MAX_CPU_PRODUCT_WORDS = 4096
# What is computed from logits passes over them some twenty times. A block of them stays in the cache meanwhile: the L2
# cache of each thread of a CPU, that of a GPU.
CPU_BLOCK_BYTES = 2**20
GPU_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Head:
    r"""A linear output head and what goes into it.

    Args:
        hidden: `(..., width)`, in front of the width the shape of the labels.
        weight: `(vocabulary, width)`. Student and teacher may differ in both.
        bias: `(vocabulary,)`.
        softcap: $c$ of $c \tanh(z / c)$, which then replaces the logits $z$.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None

    @property
    def n_words(self) -> int:
        """Words of the vocabulary."""
        return len(self.weight)

    def at(self, rows: torch.Tensor) -> Head:
        """With the hidden states of some positions, in the dtype of the products."""
        return replace(self, hidden=in_product_dtype(self.hidden[rows]))

    def full_logits(self) -> torch.Tensor:
        """All logits, `(..., vocabulary)`, for where they have to be stored."""
        logits = torch.nn.functional.linear(self.hidden, self.weight.to(self.hidden.dtype))
        if self.bias is not None:
            logits = logits + self.bias
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def detached(self, n_words: int) -> Head:
        """The first words, without gradients."""
        bias = None if self.bias is None else self.bias[:n_words].detach()
        return replace(self, hidden=self.hidden.detach(), weight=self.weight[:n_words].detach(), bias=bias)


class HeadTile:
    """Logits of some rows of a head, in the dtype of its product, and of a block of them in that of sums.

    Args:
        head: Its hidden states `(rows, width)` are multiplied a tile at a time.
        dtype: Of sums.
        with_slopes: Whether the gradient through a softcap will be wanted.
    """

    def __init__(self, head: Head, dtype: torch.dtype, with_slopes: bool) -> None:
        self.head, self.dtype = head, dtype
        self._has_slopes = with_slopes and bool(head.softcap)
        self._is_rounded = dtype != head.hidden.dtype

    @property
    def row_bytes(self) -> int:
        """Of a tile."""
        return self.head.n_words * self.head.hidden.dtype.itemsize

    @property
    def block_row_bytes(self) -> int:
        """Of a block beside the tile."""
        return self.head.n_words * self.dtype.itemsize * (self._has_slopes + self._is_rounded)

    def allocate(self, rows: int, block: int) -> None:
        """Make room for tiles of up to `rows` and blocks of up to `block` of them."""
        words, hidden = self.head.n_words, self.head.hidden
        self._tile = hidden.new_empty(rows, words)
        self._block = hidden.new_empty(block, words, dtype=self.dtype) if self._is_rounded else None
        self._slopes = hidden.new_empty(block, words, dtype=self.dtype) if self._has_slopes else None

    def multiply(self, rows: slice) -> None:
        """Compute the products of `rows`, which take the place of those before."""
        weight, some = self.head.weight, self.head.hidden[rows]
        self._first = rows.start
        self.products = self._tile[: len(some)]
        words = MAX_CPU_PRODUCT_WORDS if some.device.type == "cpu" else len(weight)
        for start in range(0, len(weight), words):
            part = slice(start, start + words)
            torch.mm(some, weight[part].to(some.dtype).T, out=self.products[:, part])

    def logits(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        r"""Those of a block of the rows that were multiplied, and with soft-capping their slopes $1 - \tanh^2$.

        The block is overwritten by the next one.
        """
        block = self._products(rows)
        if self._block is not None:
            block = self._block[: len(block)].copy_(block)
        slopes = None if self._slopes is None else self._slopes[: len(block)]
        return finish_logits(block, self.head.bias, self.head.softcap, slopes), slopes

    def replace(self, rows: slice, block: torch.Tensor) -> None:
        """Put a block, rounded, in the place of its products."""
        if self._block is not None:
            self._products(rows).copy_(block)

    def _products(self, rows: slice) -> torch.Tensor:
        return self.products[rows.start - self._first : rows.stop - self._first]


class TopTokensTile:
    """A teacher's best tokens in the place of its logits."""

    row_bytes = block_row_bytes = 0

    def __init__(self, tokens: TopTokens) -> None:
        self.tokens = tokens

    def allocate(self, rows: int, block: int) -> None:
        """They are there."""

    def multiply(self, rows: slice) -> None:
        """There is nothing to multiply."""

    def logits(self, rows: slice) -> tuple[TopTokens, None]:
        """Those of a block."""
        return self.tokens.at(rows), None


def rows_of_a_block(row_bytes: int, device: torch.device) -> int:
    """Rows that stay in the cache while they are worked on; on a CPU the same number for each thread."""
    if device.type == "cpu":
        return max(1, CPU_BLOCK_BYTES // row_bytes) * torch.get_num_threads()
    return max(1, GPU_BLOCK_BYTES // row_bytes)


def even_part(total: int, largest: int) -> int:
    """The size of the fewest parts of at most `largest` that are about equal."""
    n_parts = max(1, -(-total // largest))
    return max(1, -(-total // n_parts))
