"""Trainable parameters of the methods' own papers, counted here on models of the published shapes.

`docs/paper_counts.md` shows the same rows, and those whose configuration the papers do not state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    RobertaConfig,
    T5Config,
)

from left_trainer import get_method
from places import REPOSITORY

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
DEBERTA = {
    "vocab_size": 128100,
    "type_vocab_size": 0,
    "position_biased_input": False,
    "pos_att_type": "p2c|c2p",
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}
DEBERTA_XXL = {"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24, "intermediate_size": 6144}
# OPT keeps query, key and value apart, as the paper does, in GPT-3's architecture.
GPT3 = {
    "vocab_size": 50257,
    "hidden_size": 12288,
    "word_embed_proj_dim": 12288,
    "ffn_dim": 49152,
    "num_hidden_layers": 96,
    "num_attention_heads": 96,
    "max_position_embeddings": 2048,
}
LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
LLAMA3_8B = {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
T5_V1_1 = {"d_kv": 64, "feed_forward_proj": "gated-gelu"}

MODELS: dict[str, tuple[Any, PreTrainedConfig]] = {
    "BERT large": (AutoModel, BertConfig(vocab_size=28996, **LARGE)),
    "RoBERTa base": (AutoModel, RobertaConfig(**ROBERTA, **BASE)),
    "RoBERTa large": (AutoModel, RobertaConfig(**ROBERTA, **LARGE)),
    "DeBERTa V3 base": (AutoModel, DebertaV2Config(**DEBERTA, **BASE)),
    "DeBERTa XXL": (AutoModel, DebertaV2Config(**DEBERTA, **DEBERTA_XXL, conv_kernel_size=3)),
    "GPT-2 medium": (AutoModelForCausalLM, GPT2Config(n_embd=1024, n_layer=24, n_head=16)),
    "GPT-2 large": (AutoModelForCausalLM, GPT2Config(n_embd=1280, n_layer=36, n_head=20)),
    "GPT-3 175B": (AutoModelForCausalLM, OPTConfig(**GPT3)),
    "LLaMA 7B": (AutoModelForCausalLM, LlamaConfig()),
    "LLaMA 13B": (AutoModelForCausalLM, LlamaConfig(**LLAMA_13B)),
    "Llama 3 8B": (AutoModelForCausalLM, LlamaConfig(**LLAMA3_8B)),
    "T5 v1.1 small": (AutoModelForSeq2SeqLM, T5Config(d_model=512, d_ff=1024, num_layers=8, num_heads=6, **T5_V1_1)),
    "T5 v1.1 XL": (AutoModelForSeq2SeqLM, T5Config(d_model=2048, d_ff=5120, num_layers=24, num_heads=32, **T5_V1_1)),
    "T5 v1.1 XXL": (AutoModelForSeq2SeqLM, T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, **T5_V1_1)),
}

LORA = "LoRA, 2106.09685"
ADALORA = "AdaLoRA, 2303.10512"
BITFIT = "BitFit, 2106.10199"
DORA = "DoRA, 2402.09353"
LLAMA_ADAPTER = "LLaMA-Adapter, 2303.16199"
PREFIX = "Prefix-tuning, 2101.00190"
PROMPT = "Prompt tuning, 2104.08691"
VERA = "VeRA, 2310.11454"

BERT_QV = ["query", "value"]
DEBERTA_QV = ["query_proj", "value_proj"]
DEBERTA_ALL = ["query_proj", "key_proj", "value_proj", "output.dense", "intermediate.dense"]
DECODER_QV = ["q_proj", "v_proj"]
DORA_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
ALL_ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
ADAPTION_PROMPT = {"task_type": "CAUSAL_LM", "adapter_len": 10, "adapter_layers": 30}
BITFIT_SUBSET = {"target_modules": ["query", "intermediate.dense"]}


def lora(r: int, target_modules: list[str]) -> dict[str, Any]:
    return {"r": r, "target_modules": target_modules}


def fused_lora(r: int) -> dict[str, Any]:
    return {"r": r, "target_modules": ["c_attn"], "fan_in_fan_out": True}


def bottleneck(size: int) -> dict[str, Any]:
    return {"bottleneck_size": size}


# BERT's relatives are not in the adapters' layout table. Both of their sublayers end in an `output.dense`; the block's
# `output` closes the feed-forward sublayer, which `intermediate` opens.
def houlsby(size: int) -> dict[str, Any]:
    return {"bottleneck_size": size, "target_modules": ["output.dense"]}


def pfeiffer(size: int) -> dict[str, Any]:
    return {"bottleneck_size": size, "target_modules": r".*layer\.\d+\.output", "input_module": "intermediate"}


def prompt(tokens: int) -> dict[str, Any]:
    return {"num_virtual_tokens": tokens, "task_type": "CAUSAL_LM"}


def encoder_prompt(tokens: int) -> dict[str, Any]:
    return {"num_virtual_tokens": tokens, "task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 1}


@dataclass(frozen=True)
class Row:
    """One row of a paper's table.

    Args:
        paper: Its name and arXiv number.
        place: The table and the row; a figure or a footnote where the number stands there.
        model: A key of `MODELS`.
        method: The name of a registered method.
        figure: The count as the paper prints it, thousands (K) as millions (M).
        count: What the method trains here.
        options: Of the method's PEFT config.
    """

    paper: str
    place: str
    model: str
    method: str
    figure: str
    count: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """The start of its line in the documentation."""
        return f"| {self.paper} | {self.place} | {self.model} | `{self.method}` | {self.figure} | {self.count:,} |"


REPRODUCED = (
    Row(LORA, "table 2, BitFit", "RoBERTa base", "bitfit", "0.1M", 102_912),
    Row(LORA, "table 2, LoRA", "RoBERTa base", "lora", "0.3M", 294_912, lora(8, BERT_QV)),
    Row(LORA, "table 2, LoRA", "RoBERTa large", "lora", "0.8M", 786_432, lora(8, BERT_QV)),
    Row(LORA, "table 2, AdptP, r = 16", "RoBERTa large", "pfeiffer_adapter", "0.8M", 811_392, pfeiffer(16)),
    Row(LORA, "table 2, AdptH, r = 8", "RoBERTa large", "houlsby_adapter", "0.8M", 835_968, houlsby(8)),
    Row(LORA, "table 2, LoRA", "DeBERTa XXL", "lora", "4.7M", 4_718_592, lora(16, DEBERTA_QV)),
    Row(LORA, "table 3, FT Top2", "GPT-2 medium", "layers", "25.19M", 25_192_448, {"layers": "last:2"}),
    Row(LORA, "table 3, FT", "GPT-2 large", "full", "774.03M", 774_030_080),
    Row(LORA, "table 4, PreEmbed, 256 + 8 tokens", "GPT-3 175B", "prompt_tuning", "3.2M", 3_244_032, prompt(264)),
    Row(LORA, "table 4, AdapterH, r = 1", "GPT-3 175B", "houlsby_adapter", "7.1M", 7_078_080, bottleneck(1)),
    Row(LORA, "table 4, AdapterH, r = 8", "GPT-3 175B", "houlsby_adapter", "40.1M", 40_109_568, bottleneck(8)),
    Row(LORA, "table 4, LoRA, r = 1", "GPT-3 175B", "lora", "4.7M", 4_718_592, lora(1, DECODER_QV)),
    Row(LORA, "table 4, LoRA, r = 8", "GPT-3 175B", "lora", "37.7M", 37_748_736, lora(8, DECODER_QV)),
    Row(LORA, "table 15, PrefixEmbed, 512 + 8 tokens", "GPT-3 175B", "prompt_tuning", "6.4M", 6_389_760, prompt(520)),
    Row(LORA, "table 15, AdapterH, r = 4", "GPT-3 175B", "houlsby_adapter", "21.2M", 21_234_432, bottleneck(4)),
    Row(LORA, "table 15, AdapterH, r = 16", "GPT-3 175B", "houlsby_adapter", "77.9M", 77_859_840, bottleneck(16)),
    Row(
        LORA, "table 15, LoRA, r = 1, query to output", "GPT-3 175B", "lora", "9.4M", 9_437_184, lora(1, ALL_ATTENTION)
    ),
    Row(PREFIX, "footnote 7 (250K), E2E, 5 tokens", "GPT-2 medium", "prefix_tuning", "0.25M", 245_760, prompt(5)),
    Row(PREFIX, "footnote 7 (250K), E2E, 5 tokens", "GPT-2 medium", "p_tuning_v2", "0.25M", 245_760, prompt(5)),
    Row(PREFIX, "footnote 7 (500K), DART, 10 tokens", "GPT-2 medium", "prefix_tuning", "0.5M", 491_520, prompt(10)),
    Row(PREFIX, "table 2, PREFIX, 5 tokens", "GPT-2 medium", "prefix_tuning", "0.1%", 245_760, prompt(5)),
    Row(PROMPT, "table 4, 1 token", "T5 v1.1 small", "prompt_tuning", "512", 512, encoder_prompt(1)),
    Row(PROMPT, "table 4, 100 tokens", "T5 v1.1 XL", "prompt_tuning", "204,800", 204_800, encoder_prompt(100)),
    Row(PROMPT, "table 4, 5 tokens", "T5 v1.1 XXL", "prompt_tuning", "20,480", 20_480, encoder_prompt(5)),
    Row(PROMPT, "table 4, 150 tokens", "T5 v1.1 XXL", "prompt_tuning", "614,400", 614_400, encoder_prompt(150)),
    Row(BITFIT, "table 1, BitFit", "BERT large", "bitfit", "0.08%", 272_384),
    Row(BITFIT, "section 1, query and middle-of-MLP biases", "BERT large", "bitfit", "0.04%", 122_880, BITFIT_SUBSET),
    Row(LLAMA_ADAPTER, "table 1, Alpaca-LoRA", "LLaMA 7B", "lora", "4.2M", 4_194_304, lora(8, DECODER_QV)),
    Row(LLAMA_ADAPTER, "table 1, K = 10, L = 30", "LLaMA 7B", "adaption_prompt", "1.2M", 1_228_830, ADAPTION_PROMPT),
    Row(ADALORA, "table 1, Full FT", "DeBERTa V3 base", "full", "184M", 183_831_552),
    Row(ADALORA, "table 1, BitFit", "DeBERTa V3 base", "bitfit", "0.1M", 102_912),
    Row(ADALORA, "table 1, HAdapter, d = 16", "DeBERTa V3 base", "houlsby_adapter", "0.61M", 608_640, houlsby(16)),
    Row(ADALORA, "table 1, HAdapter, d = 8", "DeBERTa V3 base", "houlsby_adapter", "0.31M", 313_536, houlsby(8)),
    Row(ADALORA, "table 1, PAdapter, d = 32", "DeBERTa V3 base", "pfeiffer_adapter", "0.60M", 599_424, pfeiffer(32)),
    Row(ADALORA, "table 1, PAdapter, d = 16", "DeBERTa V3 base", "pfeiffer_adapter", "0.30M", 304_320, pfeiffer(16)),
    Row(ADALORA, "table 1, LoRA, r = 8", "DeBERTa V3 base", "lora", "1.33M", 1_327_104, lora(8, DEBERTA_ALL)),
    Row(ADALORA, "table 1, LoRA, r = 2", "DeBERTa V3 base", "lora", "0.33M", 331_776, lora(2, DEBERTA_ALL)),
    Row(VERA, "table 2, VeRA, r = 1024", "RoBERTa base", "vera", "0.043M", 43_008, lora(1024, BERT_QV)),
    Row(VERA, "table 2, VeRA, r = 256", "RoBERTa large", "vera", "0.061M", 61_440, lora(256, BERT_QV)),
    Row(DORA, "table 1, LoRA, r = 32", "LLaMA 7B", "lora", "0.83%", 56_098_816, lora(32, DORA_TARGETS)),
    Row(DORA, "table 1, DoRA†, r = 16", "LLaMA 7B", "dora", "0.43%", 28_925_952, lora(16, DORA_TARGETS)),
    Row(DORA, "table 1, DoRA, r = 32", "LLaMA 7B", "dora", "0.84%", 56_975_360, lora(32, DORA_TARGETS)),
    Row(DORA, "table 1, LoRA, r = 32", "LLaMA 13B", "lora", "0.67%", 87_818_240, lora(32, DORA_TARGETS)),
    Row(DORA, "table 1, DoRA†, r = 16", "LLaMA 13B", "dora", "0.35%", 45_281_280, lora(16, DORA_TARGETS)),
    Row(DORA, "table 1, DoRA, r = 32", "LLaMA 13B", "dora", "0.68%", 89_190_400, lora(32, DORA_TARGETS)),
    Row(DORA, "table 1, LoRA, r = 32", "Llama 3 8B", "lora", "0.70%", 56_623_104, lora(32, DORA_TARGETS)),
    Row(DORA, "table 1, DoRA, r = 32", "Llama 3 8B", "dora", "0.71%", 57_409_536, lora(32, DORA_TARGETS)),
)

DIFFERENT = (
    Row(LORA, "table 2, FT", "RoBERTa base", "full", "125.0M", 124_645_632),
    Row(LORA, "table 2, FT", "RoBERTa large", "full", "355.0M", 355_359_744),
    Row(LORA, "table 2, FT", "DeBERTa XXL", "full", "1500.0M", 1_564_549_632),
    Row(LORA, "table 2, AdptP, r = 64", "RoBERTa large", "pfeiffer_adapter", "3.0M", 3_171_840, pfeiffer(64)),
    Row(LORA, "table 2, AdptH, r = 64", "RoBERTa large", "houlsby_adapter", "6.0M", 6_343_680, houlsby(64)),
    Row(LORA, "table 3, FT", "GPT-2 medium", "full", "354.92M", 354_823_168),
    Row(LORA, "table 3, LoRA, r = 4", "GPT-2 medium", "lora", "0.35M", 393_216, fused_lora(4)),
    Row(LORA, "table 3, LoRA, r = 4", "GPT-2 large", "lora", "0.77M", 737_280, fused_lora(4)),
    Row(LORA, "table 3, PreLayer", "GPT-2 medium", "prefix_tuning", "0.35M", 245_760, prompt(5)),
    Row(LORA, "table 3, PreLayer", "GPT-2 large", "prefix_tuning", "0.77M", 460_800, prompt(5)),
    Row(LORA, "table 4, FT", "GPT-3 175B", "full", "175,255.8M", 174_604_283_904),
    Row(LORA, "table 4, BitFit", "GPT-3 175B", "bitfit", "14.2M", 12_988_416),
    Row(LORA, "table 4, PreLayer, 8 + 8 tokens", "GPT-3 175B", "prefix_tuning", "20.2M", 37_748_736, prompt(16)),
    Row(LORA, "table 15, PrefixEmbed, 32 + 8 tokens", "GPT-3 175B", "prompt_tuning", "0.4M", 491_520, prompt(40)),
    Row(LORA, "table 15, LoRA, r = 4", "GPT-3 175B", "lora", "18.8M", 18_874_368, lora(4, DECODER_QV)),
    Row(PROMPT, "table 4, 20 tokens", "T5 v1.1 small", "prompt_tuning", "10,420", 10_240, encoder_prompt(20)),
    Row(ADALORA, "table 1, HAdapter, d = 32", "DeBERTa V3 base", "houlsby_adapter", "1.22M", 1_198_848, houlsby(32)),
    Row(ADALORA, "table 1, PAdapter, d = 64", "DeBERTa V3 base", "pfeiffer_adapter", "1.18M", 1_189_632, pfeiffer(64)),
)


def in_the_form_of(figure: str, trainable: int, total: int) -> str:
    """`trainable` in the unit of `figure` and rounded to as many decimals."""
    number, unit = re.fullmatch(r"([\d.,]+)([M%]?)", figure).groups()
    value = trainable / {"": 1, "M": 1e6, "%": total / 100}[unit]
    thousands = "," if "," in number else ""
    return f"{value:{thousands}.{len(number.partition('.')[2])}f}{unit}"


def apply_on_meta(case: Row) -> tuple[int, int]:
    """How many parameters the wrapped model trains, and has; none is allocated."""
    auto, config = MODELS[case.model]
    method = get_method(case.method)
    with torch.device("meta"):
        model = auto.from_config(config)
        if method.config_class is not None:
            model = get_peft_model(model, method.config_class(**{**method.defaults, **case.options, **method.preset}))
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def name_of(case: Row) -> str:
    return f"{case.paper}-{case.place}-{case.model}-{case.method}"


@pytest.mark.parametrize("case", REPRODUCED, ids=name_of)
def test_counts_what_the_paper_counts(case):
    trainable, total = apply_on_meta(case)
    assert trainable == case.count
    assert in_the_form_of(case.figure, trainable, total) == case.figure


@pytest.mark.parametrize("case", DIFFERENT, ids=name_of)
def test_counts_known_to_differ(case):
    trainable, total = apply_on_meta(case)
    assert trainable == case.count
    assert in_the_form_of(case.figure, trainable, total) != case.figure


def test_the_documentation_shows_every_count():
    text = (REPOSITORY / "docs" / "paper_counts.md").read_text()
    reproduced, different = (part.splitlines() for part in text.split("## Counts that differ"))
    for cases, lines in ((REPRODUCED, reproduced), (DIFFERENT, different)):
        for case in cases:
            assert sum(line.startswith(case.line) for line in lines) == 1, case.line
