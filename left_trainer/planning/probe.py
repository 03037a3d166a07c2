"""What the machine at hand can do, measured in a second or two."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from left_trainer.planning.devices import HOPPER, Device
from left_trainer.recording.recorder import StepRecorder
from left_trainer.recording.storage_bytes import CPU, CUDA, DeviceMemory

TOKENS, WIDTH = 2048, 4096  # of the products: a batch of a language model of some billions of parameters
CPU_TOKENS, CPU_WIDTH = 256, 1024
COPIED_BYTES = {"cuda": 2**29, "cpu": 2**27}
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
SHORTEST_SECONDS = 0.05  # that a figure is taken from


def probe(kind: str | None = None) -> Device:
    """The device at hand: `cuda` where there is one, else `cpu`.

    Arithmetic, bandwidth and the cost of a launch are what a training reaches, and not the maker's peaks: products of
    the sizes of language models, an addition of large tensors, and the passes of a tiny model.

    Raises:
        ValueError: `kind` is `cuda` and there is none.
    """
    has_cuda = torch.cuda.is_available()
    kind = kind or ("cuda" if has_cuda else "cpu")
    if kind == "cuda" and not has_cuda:
        raise ValueError("device='cuda' cannot be probed: this machine has no CUDA device. Name one, or pass cpu.")
    dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if kind == "cuda" else [])
    return Device(
        name=torch.cuda.get_device_name() if kind == "cuda" else "this CPU",
        memory_bytes=memory_of(kind),
        bandwidth=_bandwidth(kind),
        flops={dtype: _flops(kind, dtype) for dtype in dtypes},
        source="measured",
        memory=_memory(kind),
        is_measured=True,
        launch_seconds=_launch_seconds(kind),
    )


def _memory(kind: str) -> DeviceMemory:
    if kind == "cpu":
        return CPU
    return HOPPER if torch.cuda.get_device_capability()[0] == 9 else CUDA


def memory_of(kind: str) -> int:
    """Bytes of the GPU, or those of the machine that are free."""
    if kind == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return int(psutil.virtual_memory().available)


def _flops(kind: str, dtype: torch.dtype) -> float:
    rows, width = (TOKENS, WIDTH) if kind == "cuda" else (CPU_TOKENS, CPU_WIDTH)
    left = torch.randn(rows, width, device=kind, dtype=dtype)
    right = torch.randn(width, width, device=kind, dtype=dtype)
    return 2 * rows * width * width / _seconds(kind, lambda: left @ right)


def _bandwidth(kind: str) -> float:
    tensor = torch.ones(COPIED_BYTES[kind] // 4, device=kind)
    result = torch.empty_like(tensor)
    return 2 * COPIED_BYTES[kind] / _seconds(kind, lambda: torch.add(tensor, 1, out=result))


def _launch_seconds(kind: str) -> float:
    """Of an operation in a forward and backward pass of a model whose kernels are short: time over operations."""
    with torch.random.fork_rng(), torch.device(kind):
        model: Any = LlamaForCausalLM(LlamaConfig(**TINY))
    ids = torch.ones(1, 8, dtype=torch.int64, device=kind)

    def passes() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    recorder = StepRecorder(kind)
    with recorder:
        passes()
    return _seconds(kind, passes) / len(recorder.recording.operations)


def _seconds(kind: str, run: Callable[[], object]) -> float:
    """The shortest time of `run`, warm."""
    best, total = float("inf"), 0.0
    run()
    while total < SHORTEST_SECONDS:
        _wait(kind)
        began = time.perf_counter()
        run()
        _wait(kind)
        seconds = time.perf_counter() - began
        best, total = min(best, seconds), total + seconds
    return best


def _wait(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()
