"""Loss and gradients of `linear_cross_entropy` against `F.cross_entropy` on full logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers.trainer_pt_utils import LabelSmoother

from left_trainer.kernels.linear_cross_entropy import linear_cross_entropy

ROWS, HIDDEN, VOCABULARY = (3, 7), 16, 2500
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# Less than a row, tiles narrower and wider than the least width, whole rows, everything at once.
WORKSPACES = (1, 4096, 40_000, 300_000, 2**24)


def example(dtype=torch.float32, bias=False, frozen=True, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    hidden = (scale * torch.randn(*ROWS, HIDDEN, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype).requires_grad_(not frozen)
    offsets = torch.randn(VOCABULARY, generator=generator).to(dtype).requires_grad_(not frozen) if bias else None
    labels = torch.randint(VOCABULARY, ROWS, generator=generator)
    labels[0, 3:] = labels[2, :2] = -100
    labels[1, :2] = torch.tensor([0, VOCABULARY - 1])
    return hidden, weight, offsets, labels


def plain_loss(hidden, weight, bias, labels, softcap=None, label_smoothing=0.0):
    """What a model does with full logits, in float32 at least; the sum over the target tokens."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if label_smoothing:
        return LabelSmoother(label_smoothing)({"logits": logits}, labels) * labels.ne(-100).sum()
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def assert_equal(dtype, workspace_bytes=2**24, **options):
    """Same loss, and same gradients in relation to their norm."""
    example_options = {name: options.pop(name) for name in ("bias", "frozen", "scale") if name in options}
    hidden, weight, bias, labels = example(dtype, **example_options)
    inputs = [item for item in (hidden, weight, bias) if item is not None and item.requires_grad]
    expected = plain_loss(hidden, weight, bias, labels, **options)
    result = linear_cross_entropy(hidden, weight, labels, bias, workspace_bytes=workspace_bytes, **options)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(result.loss_sum, expected, rtol=tolerance, atol=0)
    assert result.n_tokens == labels.ne(-100).sum()
    # The factor stands for a division by the tokens of an accumulated batch.
    for ours, plain in zip(
        torch.autograd.grad(result.loss_sum * 0.3, inputs), torch.autograd.grad(expected * 0.3, inputs), strict=True
    ):
        assert ours.dtype == dtype
        assert relative_error(ours, plain) < tolerance


def relative_error(ours, plain):
    return ((ours.double() - plain.double()).norm() / plain.double().norm()).item()


@pytest.mark.parametrize("workspace_bytes", WORKSPACES)
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"softcap": 3.0}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_equals_full_logits(frozen, options, workspace_bytes):
    assert_equal(torch.float32, workspace_bytes, frozen=frozen, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_equals_full_logits_in_other_dtypes(dtype, frozen, softcap):
    assert_equal(dtype, 300_000, frozen=frozen, bias=True, softcap=softcap)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_everything_at_once(frozen):
    assert_equal(torch.float32, 40_000, frozen=frozen, bias=True, softcap=3.0, label_smoothing=0.2)


@pytest.mark.parametrize("workspace_bytes", WORKSPACES)
def test_extreme_logits_neither_overflow_nor_lose_the_target(workspace_bytes):
    assert_equal(torch.float32, workspace_bytes, scale=100.0)


def test_a_confident_target_keeps_its_gradient_in_low_precision():
    """Rounding p to bfloat16 before subtracting 1 would leave nothing of 1 - p = 1e-4."""
    weight = torch.eye(8, dtype=torch.bfloat16)
    hidden = (11.0 * torch.eye(8, dtype=torch.bfloat16)).requires_grad_()
    linear_cross_entropy(hidden, weight, torch.arange(8)).loss_sum.backward()
    exact = torch.softmax(hidden.detach().float(), -1) - torch.eye(8)
    torch.testing.assert_close(hidden.grad.float(), exact, rtol=1e-2, atol=0)


def test_nothing_to_predict_is_a_differentiable_zero():
    for frozen in (True, False):
        hidden, weight, _, labels = example(frozen=frozen)
        result = linear_cross_entropy(hidden, weight, labels.fill_(-100))
        result.loss_sum.backward()
        assert result.loss_sum == result.n_tokens == result.n_correct == 0
        assert not hidden.grad.any()


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_without_gradient_the_loss_is_the_same(frozen):
    hidden, weight, bias, labels = example(frozen=frozen, bias=True)
    with torch.no_grad():
        result = linear_cross_entropy(hidden, weight, labels, bias)
    assert not result.loss_sum.requires_grad
    torch.testing.assert_close(result.loss_sum, plain_loss(hidden, weight, bias, labels).detach(), rtol=1e-5, atol=0)


def test_counts_the_targets_with_the_largest_logit():
    hidden, weight, bias, labels = example(bias=True)
    best = (hidden @ weight.T + bias).argmax(-1)
    labels[1, 2:5] = best[1, 2:5]
    expected = (best == labels).sum()
    assert expected >= 3
    for workspace_bytes in WORKSPACES:
        assert linear_cross_entropy(hidden, weight, labels, bias, workspace_bytes=workspace_bytes).n_correct == expected


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_autocast(frozen):
    """Products in bfloat16 from float32 weights, gradients in the dtype of what is trained."""
    hidden, weight, bias, labels = example(frozen=frozen, bias=True)
    expected = plain_loss(hidden, weight, bias, labels)
    with torch.autocast("cpu", torch.bfloat16):
        result = linear_cross_entropy(hidden, weight, labels, bias, workspace_bytes=300_000)
    torch.testing.assert_close(result.loss_sum, expected, rtol=1e-2, atol=0)
    inputs = [hidden] if frozen else [hidden, weight, bias]
    for ours, plain in zip(
        torch.autograd.grad(result.loss_sum, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert ours.dtype == torch.float32
        assert relative_error(ours, plain) < 1e-2


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_the_largest_allocation_is_the_workspace(frozen):
    """No tensor of logits beyond the bound: sizes are read from the profiler's own record of allocations."""
    rows, words = 512, 8192
    hidden, labels = torch.randn(rows, 8, requires_grad=True), torch.randint(words, (rows,))
    weight = torch.randn(words, 8, requires_grad=not frozen)
    workspace_bytes = 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, labels, workspace_bytes=workspace_bytes).loss_sum.backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert workspace_bytes <= largest <= 1.1 * workspace_bytes
    assert largest < rows * words * 4 / 10


def test_denormal_numbers_do_not_reach_the_matrix_products(monkeypatch):
    """They slow a CPU's product down tenfold; logits this far apart are what an untrained head gives."""
    seen = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append(a.clone()) or product(a, b, out=out))
    hidden, weight, _, labels = example(scale=30.0)
    linear_cross_entropy(hidden, weight, labels, workspace_bytes=40_000)
    smallest = torch.finfo(torch.float32).smallest_normal
    assert all(((factor == 0) | (factor.abs() >= smallest)).all() for factor in seen)
    assert len(seen) > 4


def test_a_second_backward_pass_is_refused():
    hidden, weight, _, labels = example()
    loss = linear_cross_entropy(hidden, weight, labels).loss_sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
