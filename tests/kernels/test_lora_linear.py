"""`lora_linear` gives the values and the gradients of the products that it replaces."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from left_trainer.kernels.lora_linear import lora_linear

IN, OUT, RANK, SCALING = 12, 20, 4, 1.5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
# Below and above the number of rows from which float32 merges the weights.
SHAPES = [(1,), (3, 5), (7, 9)]


def reference(x, weight, bias, a, b, dropout):
    """In the order of PEFT."""
    dropped = nn.functional.dropout(x, dropout)
    return nn.functional.linear(x, weight, bias) + nn.functional.linear(nn.functional.linear(dropped, a), b) * SCALING


def tensors(dtype, shape, trained):
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (*shape, IN), "weight": (OUT, IN), "bias": (OUT,), "a": (RANK, IN), "b": (OUT, RANK)}
    return {
        name: torch.randn(size, generator=generator).to(dtype).requires_grad_(name in trained)
        for name, size in sizes.items()
    }


def values_and_gradients(function, parts, dropout, seed=1):
    torch.manual_seed(seed)
    y = function(parts["x"], parts["weight"], parts["bias"], parts["a"], parts["b"], dropout)
    target = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    trained = {name: part for name, part in parts.items() if part is not None and part.requires_grad}
    gradients = torch.autograd.grad(y, list(trained.values()), target)
    return {"y": y.detach(), **dict(zip(trained, gradients, strict=True))}


def fused(x, weight, bias, a, b, dropout):
    return lora_linear(x, weight, bias, a, b, SCALING, dropout)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("trained", ["xab", "ab", "xb", "b", ("x", "a", "b", "bias")], ids="".join)
def test_values_and_gradients(trained, dropout, shape, dtype):
    expected = values_and_gradients(reference, tensors(dtype, shape, trained), dropout)
    found = values_and_gradients(fused, tensors(dtype, shape, trained), dropout)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        largest = float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=0, atol=TOLERANCE[dtype] * largest, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dims", [(0, 1), (1, 2)], ids=str)
def test_without_bias_and_with_an_input_that_is_not_contiguous(dims, dropout):
    """The input of Mamba's layers is transposed. Masks of dropout are drawn in the order of the memory."""
    parts = tensors(torch.float64, (5, 3), "xab")
    x = parts["x"].detach().transpose(*dims).contiguous().transpose(*dims)
    assert not x.is_contiguous()
    parts |= {"x": x.requires_grad_(), "bias": None}
    expected = values_and_gradients(reference, parts, dropout)
    for name, value in values_and_gradients(fused, parts, dropout).items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(0,), (3, 0)], ids=str)
def test_no_rows(shape, dropout):
    """As an expert has them that no token goes to, or LongT5's attention where there is no whole block."""
    parts = tensors(torch.float32, shape, "xab")
    found = values_and_gradients(fused, parts, dropout)
    for name, value in values_and_gradients(reference, parts, dropout).items():
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_by_finite_differences(dropout):
    parts = tensors(torch.float64, (3,), ("x", "a", "b"))

    def function(x, a, b):
        torch.manual_seed(2)
        return lora_linear(x, parts["weight"], None, a, b, SCALING, dropout)

    assert torch.autograd.gradcheck(function, (parts["x"], parts["a"], parts["b"]))


def saved_bytes(function, x):
    """What autograd holds for the backward pass beside the parameters and `x` itself."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = function(x)
    kept.pop(x.untyped_storage().data_ptr(), None)
    del outputs
    return sum(kept.values())


def layer(seed=0):
    torch.manual_seed(seed)
    return (
        nn.Parameter(torch.randn(OUT, IN), requires_grad=False),
        nn.Parameter(torch.randn(RANK, IN)),
        nn.Parameter(torch.randn(OUT, RANK)),
    )


def test_it_keeps_the_narrow_product_alone():
    weight, a, b = layer()
    x = torch.randn(10, IN, requires_grad=True)
    assert saved_bytes(lambda x: lora_linear(x, weight, None, a, b, SCALING), x) == 10 * RANK * 4
    masked = saved_bytes(lambda x: lora_linear(x, weight, None, a, b, SCALING, 0.5), x)
    assert masked == 10 * RANK * 4 + 10 * IN  # and a byte per element for the mask


def test_layers_with_one_input_share_its_cast():
    layers = [layer(seed) for seed in range(3)]
    x = torch.randn(10, IN, requires_grad=True)

    def query_key_value(x):
        return [lora_linear(x, weight, None, a, b, SCALING, compute_dtype=torch.bfloat16) for weight, a, b in layers]

    assert saved_bytes(query_key_value, x) == 10 * IN * 2 + 3 * 10 * RANK * 2


def test_a_cast_is_not_reused_after_its_input_has_changed():
    weight, a, b = layer()
    x = torch.randn(10, IN)
    first = lora_linear(x, weight, None, a, b, SCALING, compute_dtype=torch.bfloat16)
    x.mul_(2)
    second = lora_linear(x, weight, None, a, b, SCALING, compute_dtype=torch.bfloat16)
    torch.testing.assert_close(second, first * 2)


def test_the_order_of_the_products_changes_with_the_rows_and_not_in_low_precision(monkeypatch):
    merged = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: merged.append(1) or addmm(*args, **kwargs))
    weight, a, b = layer()
    for rows, dtype, expected in ((10, torch.float32, 0), (64, torch.float32, 1), (64, torch.bfloat16, 0)):
        merged.clear()
        lora_linear(torch.randn(rows, IN, dtype=dtype), weight, None, a, b, SCALING)
        assert len(merged) == expected


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled(dropout):
    parts = tensors(torch.float32, (3, 5), "xab")
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    expected = values_and_gradients(fused, parts, dropout)
    for name, value in values_and_gradients(compiled, parts, dropout).items():
        torch.testing.assert_close(value, expected[name], msg=name)
