"""Counting parameters: like PEFT where PEFT is right, at the true size where a stored size is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from left_trainer import apply_method, list_methods
from left_trainer.callbacks.trainable_parameters import count_parameters, format_count, parameter_numel
from method_settings import apply_or_skip
from tiny import tiny_model


@pytest.mark.parametrize("model_type", ["t5", "bart", "llama", "gpt2"])
@pytest.mark.parametrize("method", [method.name for method in list_methods() if method.config_class])
def test_the_same_numbers_as_peft(model_type, method, tmp_path):
    model = apply_or_skip(method, model_type, tmp_path)
    count = count_parameters(model)
    assert (count.trainable, count.total) == model.get_nb_trainable_parameters()
    assert count.method == method
    assert sum(group.total for group in count.groups) == count.total


def test_tied_weights_count_once():
    model = tiny_model("t5", tie_word_embeddings=True)
    assert model.lm_head.weight is model.shared.weight
    assert count_parameters(model).total == sum(p.numel() for p in set(model.parameters()))


def test_components_and_dtypes():
    model = apply_method(tiny_model("bart").to(torch.bfloat16), "lora")
    groups = {(group.component, group.dtype): group for group in count_parameters(model).groups}
    assert groups["encoder.layers", "float32"].trainable == groups["encoder.layers", "float32"].total > 0
    assert groups["decoder.layers", "bfloat16"].trainable == 0
    assert "lora, 12 modules matched" in format_count(count_parameters(model))


class Params4bit(nn.Parameter):
    """Stands for bitsandbytes' class of this name: two elements in each stored byte."""

    bnb_quantized = True
    quant_storage = torch.uint8


def test_four_bit_weights_count_at_their_true_size():
    packed = Params4bit(torch.zeros(8 * 4 // 2, 1, dtype=torch.uint8), requires_grad=False)
    assert parameter_numel(packed) == 32
    model = nn.Linear(8, 4)
    model.weight = packed
    count = count_parameters(model)
    assert count.total == 36
    assert {group.dtype for group in count.groups} == {"4-bit", "float32"}


def test_partitioned_weights_count_at_their_true_size():
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_numel = 1234
    assert parameter_numel(parameter) == 1234
