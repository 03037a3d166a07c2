"""Devices that people train on: memory, bandwidth and arithmetic, as their makers state them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import psutil
import torch

from left_trainer.recording.storage_bytes import CPU, CUDA, DeviceMemory, cuda_memory
from left_trainer.registry import did_you_mean

MIB, GB, TERA = 2**20, 10**9, 10**12
Dtype = torch.dtype
LAUNCH_SECONDS = 9e-6
"""Of Python, the dispatcher and autograd's engine, on the hosts that GPUs are rented with."""


@dataclass(frozen=True)
class Device:
    """A device that trains, and what it can do at best.

    Args:
        name: As in `--device`.
        memory_bytes: That the driver reports; less than what is sold where error correction takes a part.
        bandwidth: Bytes a second between memory and processor; `None` where only the memory is known.
        flops: Operations a second in products of matrices without sparsity, with sums in float32, by dtype.
        source: Where the figures are from.
        memory: What memory costs on it beside tensors.
        is_measured: Whether bandwidth and arithmetic are what a training reaches, and not what the maker states.
        launch_seconds: What an operation costs the host; on a CPU, which is its own host, beside its arithmetic.
    """

    name: str
    memory_bytes: int
    bandwidth: float | None = None
    flops: Mapping[Dtype, float] = field(default_factory=dict, hash=False)
    source: str = ""
    memory: DeviceMemory = CUDA
    is_measured: bool = False
    launch_seconds: float = LAUNCH_SECONDS

    @property
    def kernels(self) -> str:
        """`cuda` or `cpu`: as which of the two it is planned."""
        return self.memory.kind

    def peak_flops(self, dtype: Dtype) -> float:
        """Operations a second in `dtype`; in float32 where the device has no faster form of it."""
        return self.flops.get(dtype) or self.flops[torch.float32]


def _gpu(
    name: str,
    mib: int,
    gb_per_second: float,
    float32: float,
    half: float,
    source: str,
    bf16: bool = True,
    memory: DeviceMemory = CUDA,
) -> Device:
    """A GPU by MiB of memory, GB/s, and TFLOPS in float32 and in half precision."""
    flops = {torch.float32: float32 * TERA, torch.float16: half * TERA}
    if bf16:
        flops[torch.bfloat16] = half * TERA
    return Device(name, mib * MIB, gb_per_second * GB, flops, source, memory)


AMPERE = "NVIDIA Ampere GA102 GPU architecture, whitepaper"
ADA = "NVIDIA Ada GPU architecture, whitepaper"
APPLE = "Apple, technical specifications; three quarters of the memory are lent to the GPU"
# Measured on an H100 SXM (CUDA 13): what the driver counts beside what the allocator holds.
HOPPER = cuda_memory(context_mib=788, workspace_kib=32 * 1024)
_DEVICES = (
    _gpu("rtx-3060", 12_288, 360, 12.7, 25.5, "NVIDIA GeForce RTX 3060, specifications; " + AMPERE),
    _gpu("rtx-3090", 24_576, 936, 35.6, 71, AMPERE),
    _gpu("rtx-4070", 12_282, 504, 29.1, 58.3, ADA),
    _gpu("rtx-4080", 16_376, 717, 48.7, 97.5, ADA),
    _gpu("rtx-4090", 24_564, 1008, 82.6, 165.2, ADA),
    _gpu("rtx-5090", 32_607, 1792, 104.8, 209.5, "NVIDIA RTX Blackwell GPU architecture, whitepaper"),
    _gpu("t4", 15_360, 320, 8.1, 65, "NVIDIA T4, datasheet", bf16=False),
    _gpu("a10g", 23_028, 600, 31.2, 70, "Amazon EC2 G5 instances; NVIDIA A10, datasheet"),
    _gpu("l4", 23_034, 300, 30.3, 121, "NVIDIA L4, datasheet"),
    _gpu("l40s", 46_068, 864, 91.6, 362, "NVIDIA L40S, datasheet"),
    _gpu("a100-40gb", 40_960, 1555, 19.5, 312, "NVIDIA A100, datasheet"),
    _gpu("a100-80gb", 81_920, 2039, 19.5, 312, "NVIDIA A100, datasheet"),
    _gpu("h100", 81_559, 3350, 67, 989, "NVIDIA H100 SXM, datasheet", memory=HOPPER),
    _gpu("h200", 143_771, 4800, 67, 989, "NVIDIA H200 SXM, datasheet", memory=HOPPER),
    _gpu("mi300x", 196_592, 5300, 163.4, 1307, "AMD Instinct MI300X, datasheet"),
    *(
        Device(f"apple-{gib}gb", gib * 768 * MIB, source=APPLE, memory=CPU)
        for gib in (8, 16, 24, 32, 64, 128)
    ),
)  # fmt: skip
OTHER_MODELS = {"ti", "super", "laptop", "mobile", "d", "mig"}  # of the same number, and slower or faster
DEVICES = {device.name: device for device in _DEVICES}


def device_at_hand(device: torch.device) -> Device:
    """The record of `device`, without a measurement: its memory, and its speed where the maker's figures are here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = _record_of(name)
        total = torch.cuda.get_device_properties(device).total_memory
        return replace(known, memory_bytes=total) if known else Device(name, total)
    return Device(f"this {device.type.upper()}", int(psutil.virtual_memory().available), memory=CPU)


def _record_of(name: str) -> Device | None:
    """The record whose name has its parts in a driver's name of the device, as `NVIDIA A100-SXM4-80GB`."""
    words = set(name.lower().replace("-", " ").split())
    if words & OTHER_MODELS:
        return None
    found = [device for device in _DEVICES if set(device.name.split("-")) <= words]
    return max(found, key=lambda device: len(device.name), default=None)


def find_device(name: str) -> Device:
    """The device called `name`, in any case and with spaces or underscores.

    Raises:
        ValueError: There is no record of it.
    """
    key = name.strip().lower().replace("_", "-").replace(" ", "-")
    if key not in DEVICES:
        raise ValueError(
            f"device={name!r} is not known.{did_you_mean(key, DEVICES)} Expected cuda, cpu, or one of "
            f"{', '.join(DEVICES)}; for any other, give its memory (--memory_gib)."
        )
    return DEVICES[key]
