"""How allocators round the size of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

# From the bytes that a tensor needs to those that its block takes.
RoundingRule: TypeAlias = Callable[[int], int]
CUDA_BLOCK_BYTES = 512


def as_requested(n_bytes: int) -> int:
    """No rounding: the bytes of the tensors themselves."""
    return n_bytes


def in_cuda_blocks(n_bytes: int) -> int:
    """Multiples of 512 bytes, as torch's caching allocator hands out (`kMinBlockSize`)."""
    return -(-n_bytes // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES
