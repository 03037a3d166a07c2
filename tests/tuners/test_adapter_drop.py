"""AdapterDrop: lower layers without adapters, always or in a share of the steps."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from left_trainer.tuners.bottleneck import (
    HoulsbyAdapterConfig,
    ParallelAdapterConfig,
    PfeifferAdapterConfig,
    drop_lower_adapters,
)
from left_trainer.tuners.bottleneck.layer import BottleneckLayer
from left_trainer.tuners.bottleneck.lower_layers import layer_number
from tiny import tiny_model

CONFIGS = (HoulsbyAdapterConfig, PfeifferAdapterConfig, ParallelAdapterConfig)
EACH = pytest.mark.parametrize("config_class", CONFIGS, ids=lambda each: each.__name__)
BOTH = pytest.mark.parametrize("model_type", ["t5", "llama"])
IDS = torch.tensor([[5, 9, 7]])


def wrapped(model_type, config_class, drop_layers) -> PeftModel:
    layers = {"num_layers": 3, "num_decoder_layers": 3} if model_type == "t5" else {"num_hidden_layers": 3}
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_model(model_type, **layers),
        config_class(reduction_factor=4, drop_layers=drop_layers, init_weights="normal"),
    )
    with torch.no_grad():  # so that each adapter can be seen
        for name, weight in model.named_parameters():
            if "bottleneck" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    return model.eval()


def logits(model) -> torch.Tensor:
    options = {"labels": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits


def adapted(model) -> set[int]:
    return {
        layer_number(name)
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, BottleneckLayer)
    }


@EACH
@BOTH
def test_a_number_leaves_the_lower_layers_alone(model_type, config_class, tmp_path):
    model = wrapped(model_type, config_class, 2)
    assert adapted(model) == {2}
    model.save_pretrained(tmp_path)
    layers = {"num_layers": 3, "num_decoder_layers": 3} if model_type == "t5" else {"num_hidden_layers": 3}
    loaded = PeftModel.from_pretrained(tiny_model(model_type, **layers), tmp_path)
    assert loaded.active_peft_config.drop_layers == 2
    assert adapted(loaded) == {2}
    torch.testing.assert_close(logits(loaded), logits(model))


@EACH
@BOTH
def test_a_range_draws_in_training_alone(model_type, config_class):
    model = wrapped(model_type, config_class, [0, 2])
    assert adapted(model) == {0, 1, 2}
    whole = logits(model)
    torch.testing.assert_close(logits(model), whole, rtol=0, atol=0)
    model.train()
    torch.manual_seed(1)
    drawn = [logits(model) for _ in range(24)]
    kinds = {round(each.double().sum().item(), 4) for each in drawn}
    assert len(kinds) == 3  # none, one and two layers without
    torch.manual_seed(1)
    torch.testing.assert_close(logits(model), drawn[0], rtol=0, atol=0)
    model.eval()
    torch.testing.assert_close(logits(model), whole, rtol=0, atol=0)
    expected = set()
    for number in range(3):
        drop_lower_adapters(model, number)
        assert adapted(model) == set(range(number, 3))
        assert model.active_peft_config.drop_layers == number
        expected.add(round(logits(model).double().sum().item(), 4))
    assert kinds == expected


@BOTH
def test_a_layer_without_its_adapter_has_no_gradient(model_type):
    model = wrapped(model_type, HoulsbyAdapterConfig, [0, 2]).train()
    seen = set()
    for seed in range(16):
        torch.manual_seed(seed)
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        trained = [name for name, weight in model.named_parameters() if weight.grad is not None]
        seen.add(min(layer_number(name.split("bottleneck")[0]) for name in trained))
    assert seen == {0, 1, 2}


@EACH
def test_what_is_dropped_is_not_saved(config_class, tmp_path):
    model = wrapped("llama", config_class, [0, 2])
    drop_lower_adapters(model, 1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=3), tmp_path)
    assert adapted(loaded) == {1, 2}
    torch.testing.assert_close(logits(loaded), logits(model))


@pytest.mark.parametrize("value", [-1, [2, 1], [1, 1], [1, 2, 3], []])
def test_a_number_that_none_can_be_is_refused(value):
    with pytest.raises(ValueError, match="drop_layers="):
        HoulsbyAdapterConfig(drop_layers=value)


@pytest.mark.parametrize("value", [3, [0, 3]])
@BOTH
def test_all_layers_are_too_many(model_type, value):
    with pytest.raises(ValueError, match=r"drop_layers=.* must stay below 3"):
        wrapped(model_type, HoulsbyAdapterConfig, value)


def test_the_first_layer_keeps_the_invertible_adapter():
    with pytest.raises(ValueError, match="invertible=True"):
        PfeifferAdapterConfig(invertible=True, drop_layers=1)
    model = get_peft_model(tiny_model("llama"), PfeifferAdapterConfig(invertible=True, drop_layers=[0, 1]))
    drop_lower_adapters(model, 1)
    assert adapted(model) == {0, 1}
    assert any("bottleneck_invertible" in name for name, _ in model.named_parameters())


def test_as_many_as_there_are_is_refused():
    model = wrapped("llama", HoulsbyAdapterConfig, [1, 2])
    for number in (0, 3):
        with pytest.raises(ValueError, match="must be from 1 to 2"):
            drop_lower_adapters(model, number)
