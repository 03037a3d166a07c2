"""What is made of a model with fused layers, by others than `left_trainer`."""

from __future__ import annotations

import copy
import io
import pickletools
import zipfile

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from left_trainer.kernels.fused_layers import FUSED_LAYERS, use_fused_layers
from left_trainer.kernels.fused_modules import Fused
from tiny import tiny_model


def fused_model(model_type: str) -> PeftModel:
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=model_type == "gpt2")
    model = get_peft_model(tiny_model(model_type), config)
    use_fused_layers(model)
    return model.train()


def loss(model: torch.nn.Module) -> float:
    ids = torch.tensor([[5, 6, 7]])
    return model(input_ids=ids, labels=ids).loss.item()


@pytest.mark.parametrize("model_type", ["mt5", "gpt2", "gemma"])
def test_a_pickled_model_is_one_of_the_plain_classes(model_type):
    model, file = fused_model(model_type), io.BytesIO()
    torch.save(model, file)
    words = [argument for _, argument, _ in pickletools.genops(torch_pickle(file)) if isinstance(argument, str)]
    assert not [word for word in words if "left_trainer" in word]
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loss(loaded) == pytest.approx(loss(model), rel=1e-5)
    plain = copy.deepcopy(model)
    for use in FUSED_LAYERS.values():
        use(plain, False)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in plain.modules()]
    use_fused_layers(loaded)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]


def test_a_copy_is_fused_and_has_weights_of_its_own():
    model = fused_model("mt5")
    twin = copy.deepcopy(model)
    kinds = [type(module) for module in twin.modules()]
    assert kinds == [type(module) for module in model.modules()]
    assert any(issubclass(kind, Fused) for kind in kinds)
    before = loss(twin)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert loss(twin) == before


def torch_pickle(file: io.BytesIO) -> bytes:
    """What `torch.save` has pickled into the archive `file`."""
    with zipfile.ZipFile(file) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return archive.read(name)
