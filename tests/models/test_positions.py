"""How long a text may be: at the limit a model computes, beyond it none can."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from left_trainer.models.positions import COUNTING_FROM_PADDING, position_limits


@pytest.mark.parametrize("model_type", COUNTING_FROM_PADDING)
@pytest.mark.parametrize("pad_token_id", [0, 1])
def test_models_that_count_from_the_padding(model_type, pad_token_id):
    sizes = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        model_type, **sizes, intermediate_size=8, max_position_embeddings=12, is_decoder=True, pad_token_id=pad_token_id
    )
    if model_type == "xmod":
        config.default_language = "en_XX"
    model, limit = AutoModelForCausalLM.from_config(config).eval(), position_limits(config).source
    assert limit == 11 - pad_token_id
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((RuntimeError, IndexError)):
        model(input_ids=torch.full((1, limit + 1), 5))
