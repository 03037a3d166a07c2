"""What trains is what was asked: counts, adapters inside of a model, tokens, precision."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, TrainableTokensConfig, get_peft_model, inject_adapter_in_model
from transformers import FSMTConfig, FSMTForConditionalGeneration, Trainer, TrainingArguments, default_data_collator

from left_trainer import LeftTrainer, apply_method, list_methods
from left_trainer.callbacks.trainable_parameters import count_parameters
from left_trainer.models import FAMILIES, model_family
from log_history import losses
from tiny import CONFIGS, FAMILY_TYPES, TINY_BART, tiny_model

UNTIED = {"tie_word_embeddings": False}
SHAPES = {
    **{name: (name, {}) for name in CONFIGS},
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    **{f"{name}, untied": (name, UNTIED) for name in ("bart", "marian", "blenderbot", "mbart", "t5", "llama")},
    "marian, two vocabularies": ("marian", {"share_encoder_decoder_embeddings": False}),
    "fsmt": ("fsmt", {"src_vocab_size": 300, "tgt_vocab_size": 300, "langs": ["en", "de"]}),
}
OF_THE_MODEL = [
    method.name for method in list_methods() if method.family == "selective" and method.name != "trainable_tokens"
]


def model_of(shape):
    model_type, options = SHAPES[shape]
    if model_type == "fsmt":
        return FSMTForConditionalGeneration(FSMTConfig(**{**TINY_BART, **options}))
    return tiny_model(model_type, **options)


def without_gradient(model):
    """Names of the parameters that are to be trained and get no gradient in a step."""
    ids = torch.tensor([[5, 6, 7, 8, 1]])
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    model.eval()  # no layer is dropped
    model(input_ids=ids, labels=ids, **decoder, use_cache=False).loss.backward()
    return [name for name, item in model.named_parameters() if item.requires_grad and item.grad is None]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", OF_THE_MODEL)
def test_what_is_counted_gets_a_gradient(method, shape):
    try:
        model = apply_method(model_of(shape), method, {"layers": "last:1"} if method == "layers" else None)
    except ValueError as error:
        assert "does not work on" in str(error) or "no default target" in str(error)  # noqa: PT017
        return
    assert without_gradient(model) == []
    assert count_parameters(model).trainable > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_full_trains_what_a_plain_trainer_trains(shape):
    plain = model_of(shape)
    read = {name for name, item in plain.named_parameters() if item.requires_grad} - set(without_gradient(plain))
    frozen = model_of(shape).requires_grad_(False)  # as an adapter leaves it
    for model in (model_of(shape), frozen):
        model = apply_method(model, "full")
        assert {name for name, item in model.named_parameters() if item.requires_grad} == read
    half = model_of(shape)
    half.get_input_embeddings().requires_grad_(False)
    chosen = {name for name, item in half.named_parameters() if item.requires_grad} & read
    half = apply_method(half, "full")
    assert {name for name, item in half.named_parameters() if item.requires_grad} == chosen


@pytest.mark.parametrize("family", FAMILIES)
def test_full_says_that_float16_trains_in_float32(family, rows, make_args, tokenizers, caplog):
    model = tiny_model(FAMILY_TYPES[family]).half()
    args = make_args(peft_method="full", max_steps=1)
    with caplog.at_level(logging.WARNING):
        trainer = LeftTrainer(model, args, train_dataset=rows, processing_class=tokenizers[family])
    assert "trains and saves them in float32" in caplog.text
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    caplog.clear()
    apply_method(tiny_model(FAMILY_TYPES[family]).bfloat16(), "full")
    assert not caplog.text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["add_adapter", "load_adapter", "inject", "peft", "apply"])
def test_an_adapter_inside_of_the_model_is_refused(way, family, rows, make_args, tokenizers, tmp_path):
    def model():
        return tiny_model(FAMILY_TYPES[family])

    config = LoraConfig(r=2, target_modules=["q_proj"] if family == "decoder_only" else ["q"])
    if way == "add_adapter":
        given = model()
        given.add_adapter(config)
    elif way == "load_adapter":
        get_peft_model(model(), config).save_pretrained(tmp_path / "adapter")
        given = model()
        given.load_adapter(str(tmp_path / "adapter"))
    elif way == "inject":
        given = inject_adapter_in_model(config, model())
    else:
        wrapped = get_peft_model(model(), config) if way == "peft" else apply_method(model(), "ia3")
        given = wrapped.get_base_model()
    with pytest.raises(ValueError, match="has an adapter inside"):
        LeftTrainer(given, make_args(), train_dataset=rows, processing_class=tokenizers[family])


@pytest.mark.filterwarnings("ignore:Model has `tie_word", "ignore:fan_in_fan_out")
@pytest.mark.parametrize("shape", ["t5", "mt5", "llama", "qwen2", "gpt2", "opt", "bart", "bart, untied", "llama, tied"])
@pytest.mark.parametrize("kind", ["trainable_tokens", "lora", "head"])
def test_tokens_and_heads_are_trained_as_by_the_plain_trainer(kind, shape, make_args, tokenizers, tmp_path):
    if kind == "head" and model_of(shape).config.is_encoder_decoder:
        pytest.skip("TRL's loss is that of decoder-only models")
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in [[5, 6, 7, 8, 5, 1]] * 8])
    family = model_family(model_of(shape))

    def config():
        task = {"task_type": "CAUSAL_LM" if family == "decoder_only" else "SEQ_2_SEQ_LM"}
        if kind == "trainable_tokens":
            return TrainableTokensConfig(token_indices=[5, 6], **task)
        if kind == "head":
            return LoraConfig(r=2, target_modules=["lm_head"], **task)
        return LoraConfig(r=2, trainable_token_indices=[5, 6], **task)

    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=0.05, logging_steps=1, report_to="none", use_cpu=True,
        save_strategy="no", seed=3,
    )  # fmt: skip
    try:
        ours = LeftTrainer(model_of(shape), args, default_data_collator, rows, rows, peft_config=config())
    except ValueError as error:
        assert "encoder and decoder have their own" in str(error)  # noqa: PT017
        return
    base = model_of(shape)
    torch.manual_seed(3)
    plain = Trainer(get_peft_model(base, config()), args, default_data_collator, rows, rows)
    results = []
    for trainer in (ours, plain):
        trainer.train()
        results.append(losses(trainer))
    assert results[0] == pytest.approx(results[1], abs=1e-4)
    assert results[0][-1] < results[0][0]


def test_masks_of_rows_of_tokens_reach_the_model(make_args, tmp_path):
    """With the user's collator; TRL's columns have no `attention_mask`."""
    row = {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1], "labels": [-100, -100, 5, 6, 7]}
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=1e-2, logging_steps=1, report_to="none", use_cpu=True,
        save_strategy="no",
    )  # fmt: skip
    runs = [
        cls(tiny_model("gpt2"), args, default_data_collator, Dataset.from_list([row] * 8))
        for cls in (LeftTrainer, Trainer)
    ]
    for trainer in runs:
        trainer.train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-5)


def test_a_loss_that_reads_the_weight_of_an_adapted_head_is_refused(rows, make_args, tokenizers):
    args = make_args(loss_type="dft")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
    with pytest.raises(ValueError, match="loss_type='dft' reads the weight of the output head"):
        LeftTrainer(
            tiny_model("llama"),
            args,
            train_dataset=rows,
            processing_class=tokenizers["decoder_only"],
            peft_config=config,
        )
