"""A base model is loaded whole or refused: no weight is random without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from left_trainer.models import ModelSource, load_model, model_family
from tiny import CONFIGS, EMBEDDING_CONFIGS, fsmt_model, tiny_model

TYPES = dict.fromkeys([*CONFIGS, *EMBEDDING_CONFIGS])


def saved(folder: Path, model_type: str) -> tuple[object, dict[str, torch.Tensor]]:
    model = fsmt_model() if model_type == "fsmt" else tiny_model(model_type)
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("model_type", TYPES)
def test_each_weight_of_a_checkpoint_is_needed(model_type, tmp_path):
    """Tied weights stand in the file once, and buffers of positions are made anew."""
    model, weights = saved(tmp_path, model_type)
    for loaded, own in zip(load_model(str(tmp_path)).state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(loaded, own)
    left_out = max(weights)
    save_file(
        {name: weights[name] for name in weights if name != left_out}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="has no weights for"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("model_type", TYPES)
def test_a_model_without_its_head_is_whole_or_refused(model_type, tmp_path):
    model, _ = saved(tmp_path / "whole", model_type)
    headless = getattr(model, model.base_model_prefix, None)
    if headless is None:  # T5's own prefix names no module
        headless = T5EncoderModel(model.config)
    headless.save_pretrained(tmp_path / "headless")
    try:
        loaded = load_model(str(tmp_path / "headless"))
    except ValueError as error:
        assert_names_the_head(str(error), model)
    else:
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def assert_names_the_head(message: str, model: object) -> None:
    assert "has no weights for" in message
    assert type(model).__name__ in message


CHANGES = {
    "vocab_size": ({"vocab_size": 400}, "weights of another size for"),
    "width": ({"hidden_size": 32, "d_model": 32}, "weights of another size for"),
    "layers": ({"num_hidden_layers": 5, "num_layers": 5}, "no weights for"),
    "model type": ({"model_type": {"t5": "bart", "llama": "gpt2"}}, "no weights for"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("model_type", ["t5", "llama"])
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}], ids=str)
def test_a_config_of_another_model_is_refused(model_type, change, options, tmp_path):
    saved(tmp_path, model_type)
    values, problem = CHANGES[change]
    content = json.loads((tmp_path / "config.json").read_text())
    known = {name: value for name, value in values.items() if name in content}
    if change == "model type":
        known = {"model_type": values["model_type"][model_type]}
    (tmp_path / "config.json").write_text(json.dumps(content | known))
    source = ModelSource.of(str(tmp_path), options)
    with pytest.raises(ValueError, match=problem) as error:
        load_model(source)
    assert str(tmp_path) in str(error.value)
    assert model_family(source.config) == ("encoder_decoder" if model_type == "t5" else "decoder_only")
