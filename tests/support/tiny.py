"""Tiny models, a tiny tokenizer and tiny data, made from configs, offline."""

from __future__ import annotations

import os
from random import Random
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    FSMTConfig,
    FSMTForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from left_trainer.models import auto_class, model_family

VOCABULARY_SIZE = 300
TINY = {"num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
TINY_IDS = {name: TINY[name] for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
TINY_BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "scale_embedding": False,
}
TINY_LED = {**TINY_BART, "max_decoder_position_embeddings": 128, "init_std": 0.5}
del TINY_LED["max_position_embeddings"]
TINY_T5 = {
    "d_model": 16,
    "d_kv": 12,  # heads x d_kv differs from d_model, as in mT5-small
    "num_heads": 2,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
# Wide enough an initialisation that a prompt can move the logits of a model this small.
TINY_LLAMA = {
    "initializer_range": 0.3,
    **TINY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "t5": TINY_T5,
    "mt5": {**TINY_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "bart": TINY_BART,
    "mbart": TINY_BART,
    "marian": TINY_BART,
    "pegasus": TINY_BART,
    "blenderbot": TINY_BART,
    "llama": {**TINY_LLAMA, "num_key_value_heads": 1},
    "mistral": {**TINY_LLAMA, "num_key_value_heads": 1},
    "qwen2": {**TINY_LLAMA, "num_key_value_heads": 1},
    "opt": {**TINY, "hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 128},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.3, **TINY},
    "led": {**TINY_LED, "attention_window": 4, "max_encoder_position_embeddings": 128},
    "mixtral": {**TINY_LLAMA, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **TINY_LLAMA,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "gpt_oss": {
        **TINY_LLAMA,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gpt_neo": {
        **TINY_IDS,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    },
    "bloom": {**TINY_IDS, "hidden_size": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3},
    "rwkv": {**TINY_IDS, "hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2, "context_length": 128},
    "mamba": {**TINY_IDS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3},
}
# Further ways to embed ids: a scale outside of the table (Marian's own), in it or for ids and embeddings alike; tables
# of the encoder's own; a table narrower than the model.
EMBEDDING_CONFIGS: dict[str, dict[str, Any]] = {
    "m2m_100": {**TINY_BART, "scale_embedding": True},
    "own_table": {
        **TINY_BART,
        "scale_embedding": True,
        "tie_word_embeddings": False,
        "encoder_no_repeat_ngram_size": 0,  # generate leaves it out where it gets no ids
    },
    "own_table_marian": {**TINY_BART, "scale_embedding": True, "share_encoder_decoder_embeddings": False},
    "fsmt": {**TINY_BART, "langs": ["en", "de"], "src_vocab_size": VOCABULARY_SIZE, "tgt_vocab_size": VOCABULARY_SIZE},
    "gemma": {**TINY_LLAMA, "num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {**TINY_LLAMA, "num_key_value_heads": 1, "head_dim": 8},
    "xglm": {"d_model": 16, "ffn_dim": 32, "num_layers": 2, "attention_heads": 2, "max_position_embeddings": 128},
    "biogpt": {**TINY_LLAMA},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3},
    "narrow_opt": {**TINY, "hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 8, "max_position_embeddings": 128},
}
# Types that few tests are about.
RARE_CONFIGS: dict[str, dict[str, Any]] = {
    "recurrent_gemma": {
        **TINY_LLAMA,
        "num_key_value_heads": 1,
        "lru_width": 16,
        "attention_window_size": 8,
        "block_types": ["recurrent", "attention"],
    },
}
# Names in them that are a shape of a model type.
SHAPES_OF = {"own_table": "blenderbot", "own_table_marian": "marian", "narrow_opt": "opt"}
ENCODER_DECODER_TYPES = ("t5", "mt5", "bart", "mbart", "marian", "pegasus", "blenderbot")
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")
DECODER_ONLY_TYPES = ("llama", "mistral", "qwen2", "opt", "gpt2", "gpt_neo", "bloom", *MIXTURES, "mamba", "rwkv")
MODEL_TYPES = os.environ.get("TEST_MODEL_TYPES", "t5 llama").split()
FAMILY_TYPES = dict(zip(("encoder_decoder", "decoder_only"), MODEL_TYPES, strict=True))


def tiny_model(model_type: str, seed: int = 0, dropout: float = 0.0, **overrides: Any) -> PreTrainedModel:
    """A randomly initialised model of a few thousand parameters."""
    configs = {**CONFIGS, **EMBEDDING_CONFIGS, **RARE_CONFIGS}
    options = {**configs[model_type], "vocab_size": VOCABULARY_SIZE, **overrides}
    config = AutoConfig.for_model(SHAPES_OF.get(model_type, model_type), **options)
    for name in ("dropout", "dropout_rate", "attention_dropout", "activation_dropout", "resid_pdrop", "embd_pdrop"):
        if hasattr(config, name):
            setattr(config, name, dropout)
    if hasattr(config, "attn_pdrop"):
        config.attn_pdrop = dropout
    set_seed(seed)
    return auto_class(model_family(config)).from_config(config).eval()


def fsmt_model() -> PreTrainedModel:
    """FSMT makes its decoder's input of the source, writes into labels, and takes no `num_items_in_batch`."""
    width = {"d_model": 16, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    parts = {"layers": 2, "attention_heads": 2, "ffn_dim": 32}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in parts.items()}
    vocabulary = {"langs": ["en", "de"], "src_vocab_size": VOCABULARY_SIZE, "tgt_vocab_size": VOCABULARY_SIZE}
    dropout = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    set_seed(0)
    return FSMTForConditionalGeneration(FSMTConfig(**width, **sides, **vocabulary, **dropout, decoder_start_token_id=1))


def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges; adds `</s>` for encoder-decoder models, `<s>` for the others."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<pad>", "</s>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([row["prompt"] + row["completion"] for row in tiny_rows(64)], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>" if family == "encoder_decoder" else "<s> $A", special_tokens=[("</s>", 1), ("<s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>", model_max_length=128
    )


def tiny_rows(size: int = 16, seed: int = 0) -> list[dict[str, str]]:
    """Prompt/completion rows of uneven lengths."""
    rng = Random(seed)
    colours = ("red", "green", "blue", "black")
    return [
        {
            "prompt": f"Repeat {rng.randint(0, 99)} " + "and so on " * rng.randint(0, 3) + "now:",
            "completion": " " + " ".join(rng.choice(colours) for _ in range(rng.randint(1, 6))),
        }
        for _ in range(size)
    ]
