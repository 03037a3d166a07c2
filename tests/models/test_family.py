"""Whether a model is an encoder-decoder or a decoder-only one."""

from __future__ import annotations

from transformers import BartConfig, BartForConditionalGeneration

from left_trainer.models import model_family


def test_bart_is_an_encoder_decoder_by_its_config_and_by_its_class():
    config = BartConfig(vocab_size=300, d_model=16, encoder_layers=1, decoder_layers=1)
    assert model_family(BartForConditionalGeneration(config)) == "encoder_decoder"
    assert model_family(config) == "encoder_decoder"
