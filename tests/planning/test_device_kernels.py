"""Kernels of a device that is not there keep what they keep on it."""

from __future__ import annotations

import torch

from left_trainer.planning.device_kernels import rms_norm


def kept_elements(device):
    kept = {}
    x = torch.empty(6, 8, device="meta", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(id(tensor.untyped_storage()), tensor), lambda tensor: tensor
    ):
        y = rms_norm(torch.device(device), x, [8])
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    return sorted(tensor.numel() for tensor in kept.values())


def test_an_rms_norm_keeps_its_input_alone_on_a_gpu():
    assert kept_elements("cuda").count(48) == 1
