"""Dropout on a CPU that keeps a byte of each element for the backward pass, where torch keeps a number."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from left_trainer.kernels.compiled_blocks import compile_options
from left_trainer.kernels.fast_paths import COMPACT_DROPOUT, FastPath, first_reason
from left_trainer.training_args import LeftTrainingArguments

# From a tensor and the probability of a one: as many ones and zeros, in its dtype and memory layout.
Draw: TypeAlias = Callable[[torch.Tensor, float], torch.Tensor]
CHUNK_ELEMENTS = 1 << 15  # random numbers that are held at a time: they stay in the cache
HALF_RANGE = 1 << 31  # of 32 bits, as signed numbers


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, p: float, draw: Draw) -> torch.Tensor:
        keep = draw(input, 1 - p)
        ctx.scale = _scale(p, input.dtype)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(keep.to(torch.uint8))
        return keep.mul_(input).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return keep.to(gradient.dtype).mul_(gradient).mul_(ctx.scale), None, None


@functools.cache
def _scale(p: float, dtype: torch.dtype) -> float:
    """What torch multiplies by, in the precision in which it divides."""
    return torch.ones((), dtype=dtype).div_(1 - p).item()


def draw_as_torch(input: torch.Tensor, probability: float) -> torch.Tensor:
    """The masks of torch: one number after the other, on one core."""
    return torch.empty_like(input).bernoulli_(probability)


def draw_fast(input: torch.Tensor, probability: float) -> torch.Tensor:
    """Other masks in a quarter of the time, by the generator SFC64, which torch's generator seeds for each mask."""
    ones = torch.empty_like(input)
    limit = min(round(probability * 2 * HALF_RANGE) - HALF_RANGE, HALF_RANGE - 1)
    generator = np.random.SFC64(int(torch.randint(torch.iinfo(torch.int64).max, ())))
    for part in ones.as_strided((ones.numel(),), (1,)).split(CHUNK_ELEMENTS):
        words = generator.random_raw((part.numel() + 1) // 2)
        torch.lt(torch.from_numpy(words.view(np.int32))[: part.numel()], limit, out=part)
    return ones


@contextlib.contextmanager
def compact_dropout(path: FastPath, draw: Draw, is_meta: bool = False) -> Iterator[None]:
    """Inside, dropout on a CPU keeps a byte per element, for modules, functions and attention alike.

    Torch's own keeps a number per element (torch 2.13).

    Args:
        path: Counts the calls.
        draw: With `draw_as_torch`, results and random state are those of torch.
        is_meta: For tensors of the meta device in place of the CPU's.
    """

    def dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
        if not train or p == 0 or not input.numel():
            return input
        path.record(reason := first_reason({"p is 1": p == 1, "complex numbers": input.is_complex()}))
        if reason:
            return input * (input.new_zeros(()) if p == 1 else draw_as_torch(input, 1 - p).div_(1 - p))
        result: torch.Tensor = _Dropout.apply(input, p, draw)
        return result

    library = torch.library.Library("aten", "IMPL")
    library.impl("dropout", dropout, "AutogradMeta" if is_meta else "AutogradCPU")
    try:
        yield
    finally:
        del library  # which takes its kernel away


def dropout_of_run(
    args: LeftTrainingArguments, fast_paths: Mapping[str, FastPath], device: torch.device, is_meta: bool = False
) -> contextlib.AbstractContextManager[None]:
    """`compact_dropout` as far as the arguments of a run want it, and its device has use for it.

    Args:
        args: Of the run.
        fast_paths: The one of `COMPACT_DROPOUT` counts the calls, or says why there are none.
        device: Of the run.
        is_meta: Whether meta tensors stand for those of the device.
    """
    if device.type != "cpu":  # others draw in parallel, and keep bytes
        return contextlib.nullcontext()
    path = fast_paths[COMPACT_DROPOUT]
    reasons = {
        "use_compact_dropout=False": not args.use_compact_dropout,
        "torch_compile": compile_options(args) is not None,
    }
    if (reason := first_reason(reasons)) is not None:
        path.record(reason)
        return contextlib.nullcontext()
    return compact_dropout(path, draw_fast if args.fast_dropout else draw_as_torch, is_meta)
