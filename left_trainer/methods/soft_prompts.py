"""Methods that learn virtual tokens or key/value prefixes."""

from __future__ import annotations

from typing import Any

import torch
from peft import (
    AdaptionPromptConfig,
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG as ADAPTION_PROMPT_TYPES
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from left_trainer.methods.lora_hooks import call_inner_model
from left_trainer.methods.method import Feature, PeftMethod
from left_trainer.methods.registry import register_method
from left_trainer.token_mean import IGNORE_INDEX
from left_trainer.tuners.p_tuning_v2 import PTuningV2Config

NUM_VIRTUAL_TOKENS = 20
MAX_CPT_TOKENS = 32
# CPT's names for the parts of its initial prompt: 2 is the input of an example, 4 its answer.
CPT_INPUT, CPT_ANSWER = 2, 4
EMBEDDING_PROMPT_LIMITS: dict[Feature, str] = {
    "packing": "virtual tokens stand before a sequence, and packing joins several rows into one."
}
PREFIX_LIMITS: dict[Feature, str] = {
    **EMBEDDING_PROMPT_LIMITS,
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
        return {}  # PEFT reads decoder-only configs correctly, grouped-query attention included
    heads = getattr(shape, "decoder_attention_heads", None) or shape.num_attention_heads
    head_dim = getattr(shape, "d_kv", None) or shape.hidden_size // heads
    layers = getattr(shape, "decoder_layers", None) or getattr(shape, "num_decoder_layers", shape.num_hidden_layers)
    return {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * head_dim}


def every_layer(model: PreTrainedModel, config: PeftConfig) -> dict[str, Any]:
    """The paper leaves out the first two layers of a 32-layer model; a small one has none to spare.

    Raises `ValueError` for a model type that PEFT's adapted attention does not know.
    """
    if model.config.model_type not in ADAPTION_PROMPT_TYPES:
        raise ValueError(
            f"peft_method='adaption_prompt' works on {', '.join(ADAPTION_PROMPT_TYPES)} models, and this one is "
            f"{model.config.model_type}. Choose another method; p_tuning_v2 is the most similar."
        )
    layers = model.config.num_hidden_layers
    return {"adapter_layers": max(1, layers - layers // 16)}


def first_example(tokenizer: PreTrainedTokenizerBase, row: list[int]) -> dict[str, Any]:
    """CPT's initial prompt: the first training row, its last token taken for the answer."""
    ids = row[-MAX_CPT_TOKENS:]
    types = [CPT_INPUT] * (len(ids) - 1) + [CPT_ANSWER]
    return {"cpt_token_ids": ids, "cpt_mask": [1] * len(ids), "cpt_tokens_type_mask": types}


def context_loss(
    model: PeftModel, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None, ranks: int
) -> tuple[torch.Tensor, Any]:
    r"""CPT's loss, over the answers in the context too: $\sum_i w_i \ell_i / N$ with $N$ target tokens.

    PEFT's is the mean over a micro-batch, which accumulation would sum. In evaluation it is left at that.
    """
    outputs = model(**inputs)
    if num_items_in_batch is None:
        return outputs.loss, outputs
    in_context = sum(kind % 4 == 0 for kind in model.active_peft_config.cpt_tokens_type_mask[1:])
    labels = inputs["labels"]
    num_labels = labels.ne(IGNORE_INDEX).sum() + in_context * len(labels)
    return outputs.loss * num_labels / num_items_in_batch * ranks, outputs


register_method(
    PeftMethod(
        name="prompt_tuning",
        family="soft_prompt",
        summary="virtual token embeddings before the input",
        paper="Lester et al., 2021, arXiv 2104.08691",
        config_class=PromptTuningConfig,
        learning_rate=3e-2,
        learning_rate_source="a tenth of the 0.3 of Lester et al., 2021, with Adafactor; benchmarks/learning_rates.py",
        equation=r"X' = [P; X], \quad P \in \mathbb{R}^{m \times d}",
        when_to_use="The smallest adapters: a few thousand numbers a task, one frozen model for all. It needs a "
        "high learning rate and pays off on large models.",
        defaults={"num_virtual_tokens": NUM_VIRTUAL_TOKENS},
        unsupported=EMBEDDING_PROMPT_LIMITS,
    )
)

register_method(
    PeftMethod(
        name="p_tuning",
        family="soft_prompt",
        summary="virtual token embeddings, reparameterized by a small MLP",
        paper="Liu et al., 2021, arXiv 2103.10385",
        config_class=PromptEncoderConfig,
        learning_rate=1e-2,
        learning_rate_source="benchmarks/learning_rates.py",
        equation=r"X' = [\mathrm{MLP}(E); X], \quad E \in \mathbb{R}^{m \times d}",
        when_to_use="Like prompt tuning, with an encoder in training that makes it converge faster; only the computed "
        "prompts are needed afterwards.",
        defaults={"num_virtual_tokens": NUM_VIRTUAL_TOKENS, "encoder_hidden_size": 128},
        unsupported=EMBEDDING_PROMPT_LIMITS,
    )
)

register_method(
    PeftMethod(
        name="prefix_tuning",
        family="soft_prompt",
        summary="key/value prefixes in every layer of the decoder",
        paper="Li and Liang, 2021, arXiv 2101.00190",
        config_class=PrefixTuningConfig,
        learning_rate=1e-2,
        learning_rate_source="PEFT's sequence-to-sequence prefix tuning example",
        equation=r"\mathrm{head} = \mathrm{Attn}(x W_q, [P_k; x W_k], [P_v; x W_v])",
        when_to_use="Generation with few parameters. In PEFT's form prefixes reach the self-attention of the "
        "decoder only; `p_tuning_v2` reaches encoder, decoder and cross-attention.",
        defaults={"num_virtual_tokens": NUM_VIRTUAL_TOKENS},
        derive=decoder_key_value_shape,
        unsupported=PREFIX_LIMITS,
    )
)

register_method(
    PeftMethod(
        name="p_tuning_v2",
        family="soft_prompt",
        summary="key/value prefixes in every attention layer of encoder and decoder",
        paper="Liu et al., 2021, arXiv 2110.07602",
        config_class=PTuningV2Config,
        learning_rate=1e-2,
        learning_rate_source="near the 7e-3 of the authors' scripts for BoolQ; benchmarks/learning_rates.py",
        equation=r"\mathrm{softmax}\left(\tfrac{Q [P_K; K]^\top}{\sqrt{d}} + [0; M]\right) [P_V; V]",
        when_to_use="Where prompt tuning is too weak, or prefixes are wanted in an encoder-decoder model or "
        "together with gradient checkpointing.",
        defaults={"num_virtual_tokens": NUM_VIRTUAL_TOKENS},
        aliases=("ptuning_v2", "deep_prompt_tuning"),
    )
)

register_method(
    PeftMethod(
        name="multitask_prompt_tuning",
        family="soft_prompt",
        summary="one shared prompt, scaled by a low-rank matrix for each task",
        paper="Wang et al., 2023, arXiv 2303.02861",
        config_class=MultitaskPromptTuningConfig,
        learning_rate=5e-2,
        learning_rate_source="benchmarks/learning_rates.py",
        equation=r"P_t = P \odot (u_t v_t^\top)",
        when_to_use="Several related tasks at once: give rows a `task_ids` column and set `num_tasks`. With one "
        "task it is prompt tuning with a low-rank factor.",
        # With two, PEFT trains prompts in the decoder that its `generate` leaves out (peft 0.21).
        defaults={"num_virtual_tokens": NUM_VIRTUAL_TOKENS, "num_tasks": 1, "num_transformer_submodules": 1},
        unsupported=EMBEDDING_PROMPT_LIMITS,
    )
)

register_method(
    PeftMethod(
        name="cpt",
        family="soft_prompt",
        summary="a training example as prompt, its embeddings refined within a small ball",
        paper="Blau et al., 2024, arXiv 2410.17222",
        config_class=CPTConfig,
        learning_rate=1e-2,
        learning_rate_source="benchmarks/learning_rates.py",
        equation=r"X' = [E_{\mathrm{ctx}} + \delta; X], \quad \lVert \delta_i \rVert \le \epsilon",
        when_to_use="Few-shot learning: the context is real text that may move only a little, against overfitting.",
        derive_from_data=first_example,
        loss=context_loss,
        required={
            "cpt_token_ids": "the token ids of the context, with cpt_mask and cpt_tokens_type_mask of the same length. "
            "LeftTrainer takes them from the first row of train_dataset."
        },
        unsupported={
            **EMBEDDING_PROMPT_LIMITS,
            "encoder_decoder": "its loss is defined over one sequence of context and input.",
        },
        aliases=("context_aware_prompt_tuning",),
    )
)

register_method(
    PeftMethod(
        name="cartridge",
        family="soft_prompt",
        summary="a trained key/value cache in the decoder, its first token frozen",
        paper="Eyuboglu et al., 2025, arXiv 2506.06266",
        config_class=CartridgeConfig,
        learning_rate=1e-2,
        learning_rate_source="benchmarks/learning_rates.py",
        equation=r"\mathrm{head} = \mathrm{Attn}(x W_q, [Z_k; x W_k], [Z_v; x W_v])",
        when_to_use="A long document or a corpus that would otherwise stand in every prompt, distilled into a cache.",
        defaults={"num_virtual_tokens": NUM_VIRTUAL_TOKENS},
        derive=decoder_key_value_shape,
        unsupported=PREFIX_LIMITS,
    )
)

register_method(
    PeftMethod(
        name="adaption_prompt",
        family="soft_prompt",
        summary="prompts in the upper attention layers, behind a gate that starts closed",
        paper="Zhang et al., 2023, arXiv 2303.16199",
        config_class=AdaptionPromptConfig,
        learning_rate=1e-2,
        learning_rate_source="near the 9e-3 of Zhang et al., 2023; benchmarks/learning_rates.py",
        equation=r"\mathrm{Attn}(q, K, V) + g \cdot \mathrm{Attn}(q, P_k, P_v), \quad g_0 = 0",
        when_to_use="Instruction tuning of Llama-like models with very few parameters and an undisturbed start.",
        defaults={"adapter_len": 10},
        derive=every_layer,
        prepare=call_inner_model,
        unsupported={"encoder_decoder": "PEFT implements it for Llama, Mistral and GPT-2."},
        aliases=("llama_adapter",),
    )
)
