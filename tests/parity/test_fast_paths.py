"""Training with the fast paths on gives what it gives with them off, on every model type in their tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel, set_seed

from left_trainer import LeftTrainer
from left_trainer.fast_path_args import STEP_SWITCHES
from left_trainer.kernels.output_head import DECODER_ONLY_TYPES, ENCODER_DECODER_TYPES
from left_trainer.models import auto_class, model_family
from log_history import gradient_norms, losses
from tiny import CONFIGS, TINY, TINY_BART, TINY_LLAMA, TINY_T5, VOCABULARY_SIZE

WINDOWS = {"attention_window": [8, 8], "max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 128}
EXPERTS = {"num_experts": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 64}
GEMMA = {**TINY_LLAMA, "num_key_value_heads": 1, "head_dim": 8}
GEMMA_PART = {**GEMMA, "vocab_size": VOCABULARY_SIZE, "final_logit_softcapping": 5.0, "layer_types": None}
LARGER = {"max_position_embeddings": 128, "initializer_range": 0.3}
# What a model type needs beside the settings of its family.
OVERRIDES: dict[str, dict[str, Any]] = {
    **CONFIGS,
    "umt5": TINY_T5,
    "longt5": {**TINY_T5, "local_radius": 8},
    "switch_transformers": {**TINY_T5, **EXPERTS, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "led": {**TINY_BART, **WINDOWS},
    "nllb-moe": {**TINY_BART, **EXPERTS, "router_jitter_noise": 0.0, "output_router_logits": False},
    "bigbird_pegasus": {**TINY_BART, "attention_type": "original_full"},
    "pegasus_x": {**TINY_BART, "block_size": 8, "num_global_tokens": 2},
    "t5gemma": {"encoder": GEMMA_PART, "decoder": GEMMA_PART, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
    "gemma": GEMMA,
    "gemma2": {**GEMMA, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**GEMMA, "query_pre_attn_scalar": 8},
    "gptj": {**TINY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "rotary_dim": 8},
    "gpt_neox": {**TINY, **LARGER, "hidden_size": 16, "intermediate_size": 32},
    "phi3": {**TINY_LLAMA, "num_key_value_heads": 2},
    "qwen3": GEMMA,
}
STEPS = 10


def model_of(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A tiny model whose head's biases are not the zeros that they start as."""
    default = TINY_BART if model_type in ENCODER_DECODER_TYPES else TINY_LLAMA
    options = {"vocab_size": VOCABULARY_SIZE, **OVERRIDES.get(model_type, default), **overrides}
    config = AutoConfig.for_model(model_type, **options)
    for part in (config, *(getattr(config, name) for name in ("encoder", "decoder") if hasattr(config, name))):
        for name in [name for name in vars(part) if "dropout" in name or name.endswith("_pdrop")]:
            setattr(part, name, 0.0)
    set_seed(0)
    model = auto_class(model_family(config)).from_config(config)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


def train(model_type, rows, make_args, tokenizers, fast, overrides=None, **arguments):
    model = model_of(model_type, **(overrides or {}))
    options = {"max_steps": STEPS, "learning_rate": 1e-3, "max_grad_norm": 1e9, "overwrite_output_dir": True}
    switches = dict.fromkeys(STEP_SWITCHES, fast)
    args = make_args(**switches, **{**options, **arguments})
    trainer = LeftTrainer(
        model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizers[model_family(model)]
    )
    trainer.train()
    return trainer


def assert_same(
    model_type, rows, make_args, tokenizers, tolerance=1e-5, compared=(losses, gradient_norms), **arguments
):
    """Losses and gradient norms of ten steps, the loss of an evaluation, and that each side took its own path."""
    plain = train(model_type, rows, make_args, tokenizers, False, **arguments)
    ours = train(model_type, rows, make_args, tokenizers, True, **arguments)
    for values in compared:
        assert values(ours) == pytest.approx(values(plain), rel=tolerance)
    assert losses(ours)[0] != losses(ours)[-1]
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=tolerance)
    used = ours.fast_paths["linear_cross_entropy"]
    assert not used.fell_back
    assert used.ran > STEPS
    unused = plain.fast_paths["linear_cross_entropy"]
    assert unused.report() == {"ran": 0, "fell_back": {"use_linear_cross_entropy=False": used.ran}}
    adapted, never_adapted = ours.fast_paths["lora_linear"], plain.fast_paths["lora_linear"]
    assert not adapted.fell_back
    assert (adapted.ran > 0) == (never_adapted.report()["fell_back"].get("use_lora_linear=False", 0) > 0)
    return ours, plain


@pytest.mark.parametrize("model_type", sorted(ENCODER_DECODER_TYPES | DECODER_ONLY_TYPES))
def test_ten_steps_of_every_model_type(model_type, rows, make_args, tokenizers):
    assert_same(model_type, rows, make_args, tokenizers, peft_kwargs={"target_modules": "all-linear"})


METHODS = {
    "full": {},
    "lora": {"lora_dropout": 0.1},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "p_tuning": {"num_virtual_tokens": 3},
    "prefix_tuning": {"num_virtual_tokens": 3},
    "ia3": {},
    "houlsby_adapter": {},
    "bitfit": {},
}


@pytest.mark.parametrize("model_type", ["mt5", "bart", "llama"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_methods(method, model_type, rows, make_args, tokenizers):
    """Soft prompts lengthen labels and inputs inside of PEFT; full fine-tuning trains the head too."""
    assert_same(model_type, rows, make_args, tokenizers, peft_method=method, peft_kwargs=METHODS[method])


@pytest.mark.parametrize("model_type", ["t5", "bart", "gemma2"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        {"linear_cross_entropy_workspace_bytes": 20_000},
        {"linear_cross_entropy_workspace_bytes": 20_000, "peft_method": "full"},
    ],
    ids=str,
)
def test_settings_of_the_run(model_type, arguments, rows, make_args, tokenizers):
    assert_same(model_type, rows, make_args, tokenizers, **arguments)


@pytest.mark.parametrize("model_type", ["t5", "bart"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_label_smoothing(method, model_type, rows, make_args, tokenizers):
    assert_same(model_type, rows, make_args, tokenizers, peft_method=method, label_smoothing_factor=0.1)


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated")
def test_label_smoothing_of_a_decoder_only_model(rows, make_args, tokenizers):
    assert_same("llama", rows, make_args, tokenizers, label_smoothing_factor=0.1)


@pytest.mark.parametrize("model_type", ["t5", "bart", "llama", "gemma2"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_bf16(method, model_type, rows, make_args, tokenizers):
    """Losses of ten steps, and gradients at the weights where each step starts: later ones amplify the rounding."""
    arguments = {"tolerance": 1e-2, "peft_method": method, "bf16": True}
    assert_same(model_type, rows, make_args, tokenizers, compared=[losses], **arguments)
    assert_same(model_type, rows, make_args, tokenizers, learning_rate=0.0, **arguments)


@pytest.mark.parametrize("arguments", [{"packing": True, "max_length": 64}, {"completion_only_loss": False}], ids=str)
def test_data_of_decoder_only_models(arguments, rows, make_args, tokenizers):
    ours, plain = assert_same("llama", rows, make_args, tokenizers, **arguments)
    for ours_entry, entry in zip(ours.state.log_history, plain.state.log_history, strict=True):
        for name in entry.keys() & {"mean_token_accuracy", "eval_mean_token_accuracy", "num_tokens", "eval_num_tokens"}:
            assert ours_entry[name] == pytest.approx(entry[name]), name


def test_gradients_are_the_same(rows, make_args, tokenizers):
    """Entry by entry, of everything that full fine-tuning trains: the tied head gets both of its parts."""
    gradients = []
    for fast in (True, False):
        trainer = train("t5", rows, make_args, tokenizers, fast, peft_method="full", max_steps=1, learning_rate=0.0)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.model.zero_grad()
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch).backward()
        gradients.append({name: parameter.grad for name, parameter in trainer.model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-6, msg=name)
