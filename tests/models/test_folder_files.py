"""Broken files of a model or an adapter are named before weights are loaded."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from left_trainer.models.folder_files import check_folder, check_has_weights, why_not_whole


@pytest.fixture
def weights(tmp_path):
    save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_whole_file_is_whole(weights):
    assert why_not_whole(weights) is None
    check_folder(str(weights.parent), is_adapter=False)
    check_has_weights(str(weights.parent))


@pytest.mark.parametrize("length", [0, 4, 20, -1])
def test_a_cut_file_is_named(weights, length):
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors .*(cut off|not a safetensors file)"):
        check_folder(str(weights.parent), is_adapter=False)


@pytest.mark.parametrize(
    "name", ["config.json", "adapter_config.json", "tokenizer.json", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_broken_json_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        check_folder(str(tmp_path), is_adapter=False)


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "predictions.json").write_text("[]")
    check_folder(str(tmp_path), is_adapter=False)
    with pytest.raises(FileNotFoundError, match="no weights"):
        check_folder(str(tmp_path), is_adapter=True)
    with pytest.raises(FileNotFoundError, match="no weights"):
        check_has_weights(str(tmp_path))
