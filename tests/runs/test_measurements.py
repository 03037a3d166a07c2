"""Figures of a run: the size of its model, whatever a method has added to it."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from left_trainer import get_method
from left_trainer.methods.apply import apply_method
from left_trainer.runs.measurements import base_size
from tiny import tiny_model


def saved_size(model, folder) -> tuple[int, int]:
    """Elements and bytes of the files that `save_pretrained` leaves."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors").values()
    return sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("model_type", ["t5", "mt5", "mbart", "llama", "qwen2", "gpt2", "opt"])
def test_the_size_is_that_on_disk(model_type, tmp_path):
    model = tiny_model(model_type)
    elements, n_bytes = saved_size(model, tmp_path)
    parameters, model_bytes = base_size(model)
    assert model_bytes == n_bytes
    assert 0 < parameters < elements


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "bitfit", "ia3"])
@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_what_a_method_adds_is_not_counted(method, model_type):
    plain = base_size(tiny_model(model_type))
    assert base_size(apply_method(tiny_model(model_type), get_method(method).name)) == plain


def test_the_bytes_follow_the_dtype_and_are_unknown_of_a_quantized_model():
    model = tiny_model("t5")
    parameters, n_bytes = base_size(model)
    assert base_size(model.bfloat16()) == (parameters, n_bytes // 2)
    model.is_quantized = True
    assert base_size(model) == (parameters, None)
