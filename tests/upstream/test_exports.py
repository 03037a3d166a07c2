"""What converters to other formats, and PEFT's to LoRA, get wrong."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, save_as_lora

from exports import make_base
from left_trainer.models import load_tokenizer
from left_trainer.runs.merging import probe
from tiny import tiny_model


def test_a_dora_is_converted_without_its_magnitudes(tmp_path):
    """PEFT writes a LoRA that computes something else, without a word: `lora_kind` refuses it."""
    model = get_peft_model(tiny_model("llama"), LoraConfig(use_dora=True, init_lora_weights=False))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "magnitude" in name:
                weight.mul_(3)
    with pytest.warns(UserWarning, match="already a LoRA"):
        save_as_lora(tmp_path, model, rank=8)
    converted = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert not torch.allclose(probe(model, "decoder_only"), probe(converted, "decoder_only"), atol=0.1)


def test_the_converter_of_ctranslate2_reads_fields_that_bart_no_longer_has(tmp_path):
    """Once it does not, `BART_SHAPES` can go."""
    converters = pytest.importorskip("ctranslate2.converters")
    base = make_base(tmp_path / "base", "bart")
    tokenizer = load_tokenizer(base)
    tokenizer.unk_token = "</s>"
    tokenizer.save_pretrained(base)
    with pytest.raises(AttributeError, match="normalize_before"):
        converters.TransformersConverter(str(base)).convert(str(tmp_path / "out"))


def test_the_converter_of_ctranslate2_leaves_out_the_size_of_heads(tmp_path):
    """Once it does not, `_set_head_size` can go."""
    converters = pytest.importorskip("ctranslate2.converters")
    base = make_base(tmp_path / "base", "llama", head_dim=4)
    spec = converters.TransformersConverter(str(base))._load()
    attention = spec.decoder.layer[0].self_attention
    assert not hasattr(attention, "head_dim")
    object.__setattr__(attention, "head_dim", 4)
    assert vars(attention)["head_dim"] == 4
