"""Whether a model is an encoder-decoder or a decoder-only one."""

from __future__ import annotations

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, XLNetConfig, XLNetLMHeadModel

from left_trainer.models import model_family


def test_bart_is_an_encoder_decoder_by_its_config_and_by_its_class():
    config = BartConfig(vocab_size=300, d_model=16, encoder_layers=1, decoder_layers=1)
    assert model_family(BartForConditionalGeneration(config)) == "encoder_decoder"
    assert model_family(config) == "encoder_decoder"


def test_xlnet_is_refused_because_its_tokens_see_those_that_follow():
    config = XLNetConfig(vocab_size=300, d_model=16, n_layer=1, n_head=2, d_inner=32)
    model = XLNetLMHeadModel(config).eval()
    logits = [model(input_ids=torch.tensor([[5, 6, last]])).logits[0, 0] for last in (7, 8)]
    assert not torch.allclose(*logits)
    for given in (model, config):
        with pytest.raises(ValueError, match=r"model='xlnet' .* tokens see those that follow"):
            model_family(given)
