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
        workspaces: Sizes of what the matrix products keep for themselves once they have run: a block for each thread
            that launches them, the one of the forward and the one of the backward pass.
        has_segments: Whether torch's caching allocator takes segments from the device and cuts blocks from them.
    """

    kind: str
    rounding: RoundingRule = as_requested
    context_bytes: int = 0
    workspaces: tuple[int, ...] = ()
    has_segments: bool = False

    @property
    def workspace_bytes(self) -> int:
        return sum(self.workspaces)

    @property
    def overhead_bytes(self) -> int:
        return self.context_bytes + self.workspace_bytes


def cuda_memory(context_mib: int = 450, workspace_kib: int = 8320) -> DeviceMemory:
    """Of a CUDA device.

    The context of CUDA 12 and 13 with kernels that are loaded when they are first used takes 0.3 to 0.8 GiB, the more
    the larger the GPU. cuBLAS keeps 8.1 MiB for each thread, 32 MiB on Hopper (CUBLAS_WORKSPACE_CONFIG).
    """
    return DeviceMemory("cuda", in_cuda_blocks, context_mib * 2**20, (workspace_kib * 2**10,) * 2, has_segments=True)


CUDA = cuda_memory()
CPU = DeviceMemory("cpu")
