"""The base of an adapter, taken out from under it."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from left_trainer import get_method, list_methods
from left_trainer.adapters.base_model import is_changed, mark_changed, plain_base
from left_trainer.methods.saving import load_trained, save_adapter
from left_trainer.models import model_family
from left_trainer.models.source import ModelSource
from method_settings import apply_or_skip, is_adapter
from tiny import MODEL_TYPES, tiny_model

METHODS = [method.name for method in list_methods() if is_adapter(method.name) and method.quantization is None]


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "bart", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_every_weight_is_found_under_every_adapter(method, model_type, tmp_path):
    model = apply_or_skip(method, model_type, tmp_path)
    base, expected = plain_base(model), tiny_model(model_type)
    assert type(base) is type(expected)
    found = base.state_dict()
    assert found.keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_what_a_method_has_moved_into_the_adapter_is_put_back(method, model_type, tmp_path):
    model = apply_or_skip(method, model_type, tmp_path)
    record = get_method(method)
    record.initialize(model, None, {})
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = plain_base(model).state_dict()
    for name, weight in tiny_model(model_type).state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_changed_base_is_saved_and_found_where_the_folder_is(model_type, tmp_path):
    model = apply_or_skip("lora", model_type, tmp_path)
    base = model.get_base_model()
    base.get_input_embeddings().weight.data += 1.0
    mark_changed(model)
    assert is_changed(model)
    assert is_changed(base)
    save_adapter(model, tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "second")
    source = ModelSource.of(tmp_path / "second")
    assert source.base_name == str(tmp_path / "second" / "base")
    loaded = load_trained(source)
    assert isinstance(loaded, PeftModel)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_a_base_of_another_name_is_not_taken_from_beside(tmp_path, saved_models):
    """A folder `base` that an earlier run has left."""
    model = apply_or_skip("lora", "t5", tmp_path)
    assert not is_changed(model)
    model.active_peft_config.base_model_name_or_path = str(saved_models[model_family(model)])
    save_adapter(model, tmp_path / "adapter")
    model.get_base_model().save_pretrained(tmp_path / "adapter" / "base")
    assert ModelSource.of(tmp_path / "adapter").base_name == str(saved_models[model_family(model)])
