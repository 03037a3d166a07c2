"""The fused gated MLP is that of the model to the last bit, keeps less, and can be taken out again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Phi3Config, T5Config
from transformers.activations import ACT2FN, GELUActivation, GELUTanh

from left_trainer.kernels.gated_mlp import ACTIVATIONS, FUSED, use_fused_gated_mlp
from left_trainer.kernels.gelu import use_fused_gelu
from tiny import tiny_model

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
NAMES = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new")
CONFIGS = {
    "LlamaMLP": lambda act: LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, hidden_act=act),
    "Phi3MLP": lambda act: Phi3Config(hidden_size=16, intermediate_size=24, num_attention_heads=2, hidden_act=act),
    "T5DenseGatedActDense": lambda act: T5Config(d_model=16, d_ff=24, dropout_rate=0.3, dense_act_fn=act),
}


def mlp(kind, act="silu", dtype=torch.float32):
    torch.manual_seed(0)
    config = CONFIGS[kind.__name__](act)
    config.dense_act_fn = act  # T5's config makes its own of `feed_forward_proj`
    model = nn.Sequential(kind(config)).to(dtype)
    use_fused_gelu(model, True)
    return model


def values_and_gradients(model, dtype):
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    torch.manual_seed(2)  # dropout
    y = model(x)
    return [y, *torch.autograd.grad(y, [x, *model.parameters()], torch.ones_like(y))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", NAMES)
@pytest.mark.parametrize("kind", FUSED, ids=lambda kind: kind.__name__)
def test_values_and_gradients_to_the_last_bit(kind, act, dtype):
    model = mlp(kind, act, dtype)
    expected = values_and_gradients(model, dtype)
    path = use_fused_gated_mlp(model, True)
    for value, other in zip(values_and_gradients(model, dtype), expected, strict=True):
        assert value.dtype == other.dtype
        assert torch.equal(value, other)
    assert path.report() == {"ran": 1, "fell_back": {}}


def test_every_activation_is_tried():
    tried = {type(ACT2FN[name]) for name in NAMES if name != "gelu_new"}
    assert tried | {type(mlp(next(iter(FUSED)), "gelu_new")[0].act_fn)} == set(ACTIVATIONS)


def kept(model):
    """Bytes of all tensors that the backward pass needs beside the parameters, each storage once."""
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(7, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = model(x)
    del result
    for parameter in model.parameters():
        storages.pop(parameter.data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize("kind", FUSED, ids=lambda kind: kind.__name__)
def test_the_activation_is_not_kept(kind):
    model = mlp(kind).eval().requires_grad_(False)
    assert kept(model) == 3 * 7 * 24 * 4
    use_fused_gated_mlp(model, True)
    assert kept(model) == 2 * 7 * 24 * 4


def test_without_gradients_the_model_computes():
    model = mlp(next(iter(FUSED)))
    path = use_fused_gated_mlp(model, True)
    with torch.no_grad():
        model(torch.randn(2, 16))
    assert path.ran == 0


def test_a_fixed_factor_has_no_gradient():
    model = mlp(next(iter(FUSED)))
    use_fused_gated_mlp(model, True)
    model[0].up_proj.requires_grad_(False)
    model(torch.randn(2, 16)).sum().backward()
    assert model[0].gate_proj.weight.grad is not None


@pytest.mark.parametrize("act", [GELUActivation(use_gelu_python=True), GELUTanh(use_gelu_tanh_python=True), nn.Mish()])
def test_other_activations_are_left_to_the_model(act):
    model = mlp(next(iter(FUSED)))
    model[0].act_fn = act
    expected = values_and_gradients(model, torch.float32)
    path = use_fused_gated_mlp(model, True)
    assert all(map(torch.equal, values_and_gradients(model, torch.float32), expected))
    assert path.report() == {"ran": 0, "fell_back": {f"the activation is {type(act).__name__}": 1}}


def test_hooks_of_the_activation_are_called():
    model = mlp(next(iter(FUSED)))
    path = use_fused_gated_mlp(model, True)
    model[0].act_fn.register_forward_hook(lambda module, inputs, output: 2 * output)
    once = model(torch.ones(1, 16))
    model[0].act_fn._forward_hooks.clear()
    torch.testing.assert_close(once, 2 * model(torch.ones(1, 16)))
    assert path.report() == {"ran": 1, "fell_back": {"the activation has hooks": 1}}


@pytest.mark.parametrize("model_type", ["mt5", "llama", "mistral", "qwen2", "gemma", "gemma2"])
def test_put_in_counted_copied_and_taken_out(model_type):
    model = tiny_model(model_type)
    kinds = [type(module) for module in model.modules()]
    path = use_fused_gated_mlp(model, True)
    ids = torch.tensor([[5, 6, 7]])
    copy.deepcopy(model)(input_ids=ids, labels=ids)
    assert path.ran == 0  # a copy counts for itself
    use_fused_gelu(model, True)
    model(input_ids=ids, labels=ids)
    layers = 4 if model.config.is_encoder_decoder else 2
    assert path.report() == {"ran": layers, "fell_back": {}}
    use_fused_gelu(model, False)
    assert use_fused_gated_mlp(model, False).report()["fell_back"] == {"use_fused_gated_mlp=False": layers}
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("model_type", ["t5", "bart", "gpt2", "opt"])
def test_models_with_another_mlp_are_left_alone(model_type):
    assert use_fused_gated_mlp(tiny_model(model_type), True).report() == {"ran": 0, "fell_back": {}}
