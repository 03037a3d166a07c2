"""The fused GELU is transformers', and can be taken out again."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.activations import NewGELUActivation

from left_trainer.kernels.gelu import FusedNewGELU, use_fused_gelu
from tiny import tiny_model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(dtype):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    x = torch.linspace(-6, 6, 1001).to(dtype).requires_grad_()
    model = torch.nn.Sequential(NewGELUActivation())
    plain = model(x)
    expected = torch.autograd.grad(plain.sum(), x)[0]
    assert use_fused_gelu(model, True).report() == {"ran": 0, "fell_back": {}}
    fused = model(x)
    torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(torch.autograd.grad(fused.sum(), x)[0], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("model_type", ["mt5", "gpt2"])
def test_put_in_counted_copied_and_taken_out(model_type):
    model = tiny_model(model_type)
    kinds = [type(module) for module in model.modules()]
    path = use_fused_gelu(model, True)
    number = sum(type(module) is FusedNewGELU for module in model.modules())
    assert number == kinds.count(NewGELUActivation) > 0
    ids = torch.tensor([[5, 6, 7]])
    copy.deepcopy(model)(input_ids=ids, labels=ids)
    assert path.ran == 0  # a copy counts for itself
    model(input_ids=ids, labels=ids)
    assert path.report() == {"ran": number, "fell_back": {}}
    assert use_fused_gelu(model, False).report() == {"ran": 0, "fell_back": {"use_fused_gelu=False": number}}
    assert [type(module) for module in model.modules()] == kinds


def test_models_with_another_activation_are_left_alone():
    assert use_fused_gelu(tiny_model("llama"), True).report() == {"ran": 0, "fell_back": {}}
