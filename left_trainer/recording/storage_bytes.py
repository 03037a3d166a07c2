"""How allocators round the size of a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class DeviceMemory:
    """What memory costs on a kind of device, beside the tensors themselves.

    Args:
        kind: As in `torch.device(kind)`: it decides which kernels run.
        rounding: Of a block.
        context_bytes: What the driver and the libraries take before the first tensor.
        workspace_bytes: What the matrix products keep for themselves once they have run.
    """

    kind: str
    rounding: RoundingRule = as_requested
    context_bytes: int = 0
    workspace_bytes: int = 0

    @property
    def overhead_bytes(self) -> int:
        return self.context_bytes + self.workspace_bytes


# The context of CUDA 12 and 13 with torch's kernels loaded lazily takes 0.3 to 0.6 GiB, by `nvidia-smi` after the first
# operation; cuBLAS keeps 8 MiB a stream (32 on Hopper), see CUBLAS_WORKSPACE_CONFIG in its documentation.
CUDA = DeviceMemory("cuda", in_cuda_blocks, context_bytes=450 * 2**20, workspace_bytes=8 * 2**20)
CPU = DeviceMemory("cpu")
