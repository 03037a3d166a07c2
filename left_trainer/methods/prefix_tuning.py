"""Prefix tuning and cartridges: virtual tokens in the key/value cache of the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import (
    CartridgeConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    initialize_kv_prefix_from_past_key_values,
)
from transformers import PreTrainedModel

from left_trainer.adapters.prompt_encoder import PROMPT_ENCODER
from left_trainer.methods.learning_rates import metamathqa
from left_trainer.methods.limits import NO_PACKING
from left_trainer.methods.method import Batches, Feature, PeftMethod
from left_trainer.methods.training_text import text_inputs
from left_trainer.methods.virtual_tokens import IN_DECODER_CACHE, NUM_VIRTUAL_TOKENS
from left_trainer.models.wrapping import evaluating
from left_trainer.tuners.p_tuning_v2 import PTuningV2Config

PREFIX_STARTS = ("auto", "text", "random")
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
    if not hasattr(shape, "num_attention_heads"):
        raise ValueError(
            f"{type(model).__name__} has no attention with a key/value cache for a prefix to stand in. Choose another "
            "method, such as lora with target_modules."
        )
    if not shape.is_encoder_decoder:
        # PEFT reads decoder-only configs correctly, grouped-query attention included, but for XGLM's number of heads.
        return {"num_attention_heads": shape.num_attention_heads}
    heads = getattr(shape, "decoder_attention_heads", None) or shape.num_attention_heads
    head_dim = getattr(shape, "d_kv", None) or shape.hidden_size // heads
    layers = getattr(shape, "decoder_layers", None) or getattr(shape, "num_decoder_layers", shape.num_hidden_layers)
    return {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * head_dim}


def starts_from_text(model: PreTrainedModel, options: Mapping[str, Any]) -> bool:
    """Whether prefixes of `model` start from training text; `auto` means in decoder-only models.

    There text before a prompt is what the model was trained on. A second source or target is not: with it, prefixes of
    encoder-decoder models started and ended with a higher loss than random ones (docs/results.md).

    Raises:
        ValueError: A start of another name.
    """
    start = options["prefix_start"]
    if start not in PREFIX_STARTS:
        raise ValueError(f"peft_kwargs has prefix_start={start!r}: expected one of {', '.join(PREFIX_STARTS)}.")
    return start == "text" or (start == "auto" and not model.config.is_encoder_decoder)


@torch.no_grad()
def initialize_from_text(model: PeftModel, batches: Batches, options: Mapping[str, Any]) -> None:
    """Start prefixes from the keys and values of training text, as the base model computes them.

    A projected prefix is computed by a network, which starts at random.
    """
    config, base = model.active_peft_config, model.get_base_model()
    is_computed = getattr(config, "prefix_projection", False) or getattr(config, "init_weights", None) == "zero"
    if is_computed or not starts_from_text(base, options) or not config.num_virtual_tokens:
        return
    with evaluating(base):
        cache = base(**text_inputs(base, batches, config.num_virtual_tokens), use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(model, past_key_values=getattr(cache, "self_attention_cache", cache))


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
    hook_options={"prefix_start": "auto"},
    initialize=initialize_from_text,
    virtual_tokens=IN_DECODER_CACHE,
    training_state=PROMPT_ENCODER,
    unsupported={**PREFIX_LIMITS, "shrinking": "its prefixes are stored for all layers in one table."},
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
    hook_options={"prefix_start": "auto"},
    initialize=initialize_from_text,
    virtual_tokens=IN_DECODER_CACHE,
    training_state=PROMPT_ENCODER,
    unsupported={**PREFIX_LIMITS, "shrinking": "its prefixes are stored for all layers in one table."},
)


def initialize_p_tuning_v2(model: PeftModel, batches: Batches, options: Mapping[str, Any]) -> None:
    """As `initialize_from_text`, for every attention layer: of encoder, decoder and between them."""
    base, count = model.get_base_model(), model.active_peft_config.num_virtual_tokens
    if starts_from_text(base, options):
        with evaluating(base):
            model.base_model.start_from_text(model.active_adapter, text_inputs(base, batches, count))


P_TUNING_V2 = PeftMethod(
    name="p_tuning_v2",
    family="soft_prompt",
    summary="key/value prefixes in every attention layer of encoder and decoder",
    paper="Liu et al., 2021, arXiv 2110.07602",
    config_class=PTuningV2Config,
    narrow_learning_rate=3e-2,
    learning_rate=5e-3,
    learning_rate_source="that of prefix_tuning; near the 7e-3 of the authors' scripts for BoolQ",
    equation=r"\mathrm{softmax}\left(\tfrac{Q [P_K; K]^\top}{\sqrt{d}} + [0; M]\right) [P_V; V]",
    when_to_use="Where prompt tuning is too weak, or prefixes are wanted in an encoder-decoder model or "
    "together with gradient checkpointing.",
    defaults={"num_virtual_tokens": NUM_VIRTUAL_TOKENS},
    hook_options={"prefix_start": "auto"},
    initialize=initialize_p_tuning_v2,
    aliases=("ptuning_v2", "deep_prompt_tuning"),
)
