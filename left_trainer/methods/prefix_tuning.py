"""Prefix tuning and cartridges: virtual tokens in the key/value cache of the decoder."""

from __future__ import annotations

from typing import Any

from peft import CartridgeConfig, PeftConfig, PrefixTuningConfig
from transformers import PreTrainedModel

from left_trainer.adapters.prompt_encoder import PROMPT_ENCODER
from left_trainer.methods.learning_rates import metamathqa
from left_trainer.methods.limits import NO_PACKING
from left_trainer.methods.method import Feature, PeftMethod
from left_trainer.methods.virtual_tokens import IN_DECODER_CACHE, NUM_VIRTUAL_TOKENS

PREFIX_LIMITS: dict[Feature, str] = {
    **NO_PACKING,
    "gradient_checkpointing": (
        "its prefixes travel in the key/value cache, which recomputation would fill twice; p_tuning_v2 does not."
    ),
}


def decoder_key_value_shape(model: PreTrainedModel, config: PeftConfig) -> dict[str, Any]:
    """Shape of the decoder's key/value cache, where the prefix is inserted.

    PEFT reads the encoder's layers and heads and assumes `d_model = heads x head_dim`. That is wrong for models whose
    decoder differs from the encoder (Blenderbot-3B: 2 encoder and 24 decoder layers) and for T5 sizes whose heads are
    wider or narrower than that (mT5-small: 6 heads of 64 in 512).
    """
    shape = model.config
    if not shape.is_encoder_decoder:
        # PEFT reads decoder-only configs correctly, grouped-query attention included, but for XGLM's number of heads.
        return {"num_attention_heads": shape.num_attention_heads}
    heads = getattr(shape, "decoder_attention_heads", None) or shape.num_attention_heads
    head_dim = getattr(shape, "d_kv", None) or shape.hidden_size // heads
    layers = getattr(shape, "decoder_layers", None) or getattr(shape, "num_decoder_layers", shape.num_hidden_layers)
    return {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * head_dim}


PREFIX_TUNING = PeftMethod(
    name="prefix_tuning",
    family="soft_prompt",
    summary="key/value prefixes in every layer of the decoder",
    paper="Li and Liang, 2021, arXiv 2101.00190",
    config_class=PrefixTuningConfig,
    narrow_learning_rate=3e-2,
    learning_rate=5e-3,
    learning_rate_source=metamathqa(5e-3, 41.6) + "; from a text",
    equation=r"\mathrm{head} = \mathrm{Attn}(x W_q, [P_k; x W_k], [P_v; x W_v])",
    when_to_use="Generation with few parameters. In PEFT's form prefixes reach the self-attention of the "
    "decoder only; `p_tuning_v2` reaches encoder, decoder and cross-attention.",
    defaults={"num_virtual_tokens": NUM_VIRTUAL_TOKENS},
    derive=decoder_key_value_shape,
    virtual_tokens=IN_DECODER_CACHE,
    training_state=PROMPT_ENCODER,
    unsupported=PREFIX_LIMITS,
)

CARTRIDGE = PeftMethod(
    name="cartridge",
    family="soft_prompt",
    summary="a trained key/value cache in the decoder, its first token frozen",
    paper="Eyuboglu et al., 2025, arXiv 2506.06266",
    config_class=CartridgeConfig,
    narrow_learning_rate=3e-2,
    learning_rate=5e-3,
    learning_rate_source="that of prefix_tuning",
    equation=r"\mathrm{head} = \mathrm{Attn}(x W_q, [Z_k; x W_k], [Z_v; x W_v])",
    when_to_use="A long document or a corpus that would otherwise stand in every prompt, distilled into a cache.",
    defaults={"num_virtual_tokens": NUM_VIRTUAL_TOKENS},
    derive=decoder_key_value_shape,
    virtual_tokens=IN_DECODER_CACHE,
    training_state=PROMPT_ENCODER,
    unsupported=PREFIX_LIMITS,
)
