"""The fused RMSNorm is that of the model, keeps less, and can be taken out again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from left_trainer.kernels.rms_norm import FUSED, use_fused_rms_norm
from tiny import tiny_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIXED = [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def norm(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    module = kind(48).to(dtype)
    nn.init.normal_(module.weight, 1.0, 0.3)
    return nn.Sequential(module)


def saved_bytes(compute) -> int:
    """Of all tensors that are kept for the backward pass, each storage once."""
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = compute()
    del result
    return sum(storages.values())


@pytest.mark.parametrize(("x_dtype", "weight_dtype"), MIXED, ids=str)
@pytest.mark.parametrize("kind", FUSED, ids=lambda kind: kind.__name__)
def test_values_gradients_and_what_is_kept(kind, x_dtype, weight_dtype):
    torch.manual_seed(0)
    model = norm(kind, weight_dtype)
    x = (3 * torch.randn(4, 7, 48)).to(x_dtype).requires_grad_()
    plain = model(x)
    direction = torch.randn_like(plain)
    inputs = [x, model[0].weight]
    expected = torch.autograd.grad(plain, inputs, direction)
    plain_bytes = saved_bytes(lambda: model(x))
    path = use_fused_rms_norm(model, True)
    fused = model(x)
    tolerance = TOLERANCE[x_dtype]
    assert fused.dtype == plain.dtype
    torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)
    for gradient, other in zip(torch.autograd.grad(fused, inputs, direction), expected, strict=True):
        assert gradient.dtype == other.dtype
        torch.testing.assert_close(gradient, other, rtol=tolerance, atol=10 * tolerance)
    assert path.report() == {"ran": 1, "fell_back": {}}
    assert saved_bytes(lambda: model(x)) < 0.7 * plain_bytes


def test_a_frozen_weight_and_a_fixed_input_have_no_gradient():
    model = norm(next(iter(FUSED)), torch.float32)
    use_fused_rms_norm(model, True)
    x = torch.randn(2, 48, requires_grad=True)
    model[0].weight.requires_grad_(False)
    model(x).sum().backward()
    assert x.grad is not None
    assert model[0].weight.grad is None
    model[0].weight.requires_grad_(True)
    model(x.detach()).sum().backward()
    assert model[0].weight.grad is not None


def test_a_second_derivative_is_refused_and_not_wrong():
    model = norm(next(iter(FUSED)), torch.float32)
    use_fused_rms_norm(model, True)
    x = torch.randn(2, 48, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_other_dtypes_and_evaluation_are_left_to_the_model():
    model = norm(next(iter(FUSED)), torch.float64)
    path = use_fused_rms_norm(model, True)
    model(torch.randn(2, 48, dtype=torch.float64))
    assert path.report() == {"ran": 0, "fell_back": {"the input is in float64": 1}}
    with torch.no_grad():
        model(torch.randn(2, 48, dtype=torch.float64))
    assert path.report() == {"ran": 0, "fell_back": {"the input is in float64": 1}}


@pytest.mark.parametrize("model_type", ["t5", "mt5", "llama", "mistral", "gemma", "gemma2"])
def test_put_in_counted_copied_and_taken_out(model_type):
    model = tiny_model(model_type)
    kinds = [type(module) for module in model.modules()]
    number = sum("Norm" in kind.__name__ for kind in kinds)
    path = use_fused_rms_norm(model, True)
    ids = torch.tensor([[5, 6, 7]])
    copy.deepcopy(model)(input_ids=ids, labels=ids)
    assert path.ran == 0  # a copy counts for itself
    model(input_ids=ids, labels=ids)
    assert path.report() == {"ran": number, "fell_back": {}}
    assert use_fused_rms_norm(model, False).report()["fell_back"] == {"use_fused_rms_norm=False": number}
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("model_type", ["bart", "gpt2", "opt"])
def test_models_with_another_norm_are_left_alone(model_type):
    assert use_fused_rms_norm(tiny_model(model_type), True).report() == {"ran": 0, "fell_back": {}}
