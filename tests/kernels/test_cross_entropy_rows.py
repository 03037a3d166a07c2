"""The Triton kernel against PyTorch's own loss, on a GPU, or with `TRITON_INTERPRET=1` in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn import functional

from left_trainer.kernels import cross_entropy_rows as module
from left_trainer.kernels.linear_cross_entropy import linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and not (os.environ.get("TRITON_INTERPRET") and module.has_triton()),
    reason="needs a GPU, or Triton with TRITON_INTERPRET=1",
)
ROWS, WORDS = 3, 2 * module.BLOCK_WORDS + 77
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def logits_of(dtype, scale=3.0):
    generator = torch.Generator().manual_seed(1)
    logits = (scale * torch.randn(ROWS, WORDS, generator=generator)).to(DEVICE, dtype)
    bias = torch.randn(WORDS, generator=generator).to(DEVICE, dtype)
    targets = torch.tensor([0, WORDS - 1, module.BLOCK_WORDS], device=DEVICE)
    logits[2, targets[2]] = 22.0  # nearly certain
    return logits, bias, targets


def run_kernel(logits, targets, bias, softcap, smoothing, with_gradient=True):
    losses = torch.empty(len(logits), device=DEVICE)
    is_correct = torch.empty(len(logits), dtype=torch.bool, device=DEVICE)
    module.launch(logits, targets, bias, losses, is_correct, softcap, smoothing, with_gradient)
    return losses, is_correct


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("has_bias", "softcap", "smoothing"), [(False, None, 0.0), (True, None, 0.1), (True, 5.0, 0.0), (False, 5.0, 0.1)]
)
def test_equals_pytorch(dtype, has_bias, softcap, smoothing):
    logits, bias, targets = logits_of(dtype)
    exact = logits.double().requires_grad_()
    shaped = exact + bias.double() if has_bias else exact
    shaped = softcap * torch.tanh(shaped / softcap) if softcap else shaped
    expected = functional.cross_entropy(shaped, targets, reduction="none", label_smoothing=smoothing)
    expected.sum().backward()
    losses, is_correct = run_kernel(logits, targets, bias if has_bias else None, softcap, smoothing)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    for ours, plain in zip(logits.double(), exact.grad, strict=True):
        assert (ours - plain).norm() <= TOLERANCES[dtype] * plain.norm()
    assert torch.equal(is_correct, shaped.argmax(1) == targets)


@needs_triton
def test_without_gradient_the_logits_stay():
    logits, _, targets = logits_of(torch.float32)
    before = logits.clone()
    run_kernel(logits, targets, None, None, 0.0, with_gradient=False)
    assert torch.equal(logits, before)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"label_smoothing": 0.1}], ids=str)
def test_the_head_on_a_gpu_equals_the_one_on_a_cpu(frozen, options):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(50, 64, generator=generator)
    weight, bias = torch.randn(5000, 64, generator=generator), torch.randn(5000, generator=generator)
    labels = torch.randint(5000, (50,), generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        inputs = [tensor.to(device).requires_grad_() for tensor in (hidden, weight, bias)]
        for tensor in inputs[1:]:
            tensor.requires_grad_(not frozen)
        loss = linear_cross_entropy(*inputs[:2], labels.to(device), inputs[2], workspace_bytes=200_000, **options)
        gradients = torch.autograd.grad(loss.loss_sum, [tensor for tensor in inputs if tensor.requires_grad])
        results.append([loss.loss_sum, loss.n_correct, *gradients])
    for mine, reference in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine.cpu().float(), reference.float(), rtol=1e-4, atol=1e-4)
