"""Methods that learn virtual tokens or key/value prefixes: prompt tuning, P-tuning, prefix tuning."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from left_trainer.methods.method import PeftMethod
from left_trainer.methods.registry import register_method

NUM_VIRTUAL_TOKENS = 20


def decoder_key_value_shape(config: PreTrainedConfig) -> dict[str, Any]:
    """Shape of the decoder's key/value cache, where the prefix is inserted.

    PEFT reads the encoder's layers and heads and assumes `d_model = heads x head_dim`. That is wrong for models whose
    decoder differs from the encoder (Blenderbot-3B: 2 encoder and 24 decoder layers) and for T5 sizes whose heads are
    wider or narrower than that (mT5-small: 6 heads of 64 in 512).
    """
    if not config.is_encoder_decoder:
        return {}  # PEFT reads decoder-only configs correctly, grouped-query attention included
    heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "d_kv", None) or config.hidden_size // heads
    layers = getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", config.num_hidden_layers)
    return {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * head_dim}


register_method(
    PeftMethod(
        name="prompt_tuning",
        family="soft_prompt",
        summary="virtual token embeddings before the input",
        paper="Lester et al., 2021, arXiv 2104.08691",
        config_class="PromptTuningConfig",
        learning_rate=3e-2,
        learning_rate_source="a tenth of the 0.3 of Lester et al., 2021, with Adafactor; benchmarks/learning_rates.py",
        defaults={"num_virtual_tokens": NUM_VIRTUAL_TOKENS},
    )
)

register_method(
    PeftMethod(
        name="p_tuning",
        family="soft_prompt",
        summary="virtual token embeddings, reparameterized by a small MLP",
        paper="Liu et al., 2021, arXiv 2103.10385",
        config_class="PromptEncoderConfig",
        learning_rate=1e-2,
        learning_rate_source="benchmarks/learning_rates.py",
        defaults={"num_virtual_tokens": NUM_VIRTUAL_TOKENS, "encoder_hidden_size": 128},
    )
)

register_method(
    PeftMethod(
        name="prefix_tuning",
        family="soft_prompt",
        summary="key/value prefixes in every layer of the decoder",
        paper="Li and Liang, 2021, arXiv 2101.00190",
        config_class="PrefixTuningConfig",
        learning_rate=1e-2,
        learning_rate_source="PEFT's sequence-to-sequence prefix tuning example",
        defaults={"num_virtual_tokens": NUM_VIRTUAL_TOKENS},
        derive=decoder_key_value_shape,
        gradient_checkpointing=False,
    )
)
