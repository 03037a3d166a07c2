"""Tiny models of every type that can be shrunk, in several shapes, and parts to take out of them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from left_trainer.compression.architecture import architecture_of
from left_trainer.compression.removal import Kept
from left_trainer.compression.sizes import size_of
from tiny import tiny_model

T5 = {"num_heads": 4, "num_layers": 3, "num_decoder_layers": 5}
BART = {"encoder_layers": 3, "decoder_layers": 4}
LLAMA = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
# By name: the model type and what of its tiny config is otherwise.
SHRINKABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", T5),
    "t5_gated": ("t5", {**T5, "feed_forward_proj": "gated-gelu", "d_ff": 33}),
    "mt5": ("mt5", T5),
    "bart": ("bart", BART),
    "bart_uneven": ("bart", {**BART, "decoder_ffn_dim": 48, "activation_function": "relu"}),
    "bart_untied": ("bart", {**BART, "tie_word_embeddings": False}),
    "mbart": ("mbart", BART),
    "marian": ("marian", BART),
    "marian_two_tables": ("own_table_marian", BART),
    "pegasus": ("pegasus", BART),
    "llama": ("llama", LLAMA),
    "llama_biases": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama_ungrouped": ("llama", {**LLAMA, "num_key_value_heads": 4, "head_dim": 6}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2_windows": ("qwen2", {**LLAMA, **WINDOWS, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**LLAMA, "head_dim": 6}),
    "gpt2": ("gpt2", {"num_hidden_layers": 3}),
    "gpt2_untied": ("gpt2", {"num_hidden_layers": 3, "n_inner": 40, "tie_word_embeddings": False}),
    "opt": ("opt", {"num_hidden_layers": 3}),
    "opt_narrow": ("narrow_opt", {"num_hidden_layers": 3, "do_layer_norm_before": False, "enable_bias": False}),
}
IDS = torch.arange(5, 21).view(2, 8)
LABELS = torch.arange(30, 40).view(2, 5)


def shrinkable(name: str, **overrides: Any) -> PreTrainedModel:
    model_type, options = SHRINKABLE[name]
    model = tiny_model(model_type, **{**options, **overrides})
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:  # biases start at zero and weights too small to tell; tables of sines stay
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    model.tie_weights()
    return model


def logits(model: Any, is_encoder_decoder: bool | None = None) -> torch.Tensor:
    """Of one batch, without dropout."""
    if is_encoder_decoder is None:
        is_encoder_decoder = model.config.is_encoder_decoder
    labels = {"labels": LABELS} if is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **labels).logits


def some_parts(config: PreTrainedConfig, layers: bool = True, ffn: bool = True, heads: bool = True) -> Kept:
    """Half the neurons and heads, others in each module where the class lets them differ; the first and third block go.

    The last block stays.
    """
    architecture, size = architecture_of(config), size_of(config)
    generator = torch.Generator().manual_seed(1)

    def half(count: int) -> torch.Tensor:
        return torch.randperm(count, generator=generator)[: count // 2].sort().values

    kept_layers = {stack: tuple(range(count)) for stack, count in size.layers.items()}
    blocks = architecture.blocks(config)
    return Kept(
        layers={
            stack: tuple(index for index in kept if not layers or index not in (0, 2) or index == kept[-1])
            for stack, kept in kept_layers.items()
        },
        neurons={block.feed_forward: half(size.ffn[block.stack]) for block in blocks} if ffn else {},
        heads={
            name: chosen
            for names in architecture.equal_heads(config)
            for chosen in [half(size.heads)]
            for name in names
        }
        if heads and size.heads
        else {},
    )
