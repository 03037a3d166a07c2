"""Rows that are longer than a model has positions are cut, counted and said."""

from __future__ import annotations

import logging

import pytest
from datasets import Dataset, IterableDataset
from peft import PromptTuningConfig

from left_trainer import DataArguments, LeftTrainer, get_task, prepare_task_data
from left_trainer.data.cut_rows import CutRows, describe_cuts
from left_trainer.models import FAMILIES, model_family
from left_trainer.models.positions import Limits, position_limits
from log_history import losses
from tiny import CONFIGS, tiny_model, tiny_tokenizer

N_POSITIONS = 128
N_VIRTUAL = 20
LONG = "word " * 50
ROWS = [
    {"prompt": "short", "completion": " fine"},
    {"prompt": LONG, "completion": " fine"},
    {"prompt": "short", "completion": f" {LONG}"},
    {"prompt": "again", "completion": " fine"},
]
WITHOUT_POSITIONS = ("t5", "mt5", "llama", "mistral", "qwen2", "qwen3_moe", "gpt_oss", "bloom")
NOT_FOR_SOFT_PROMPTS = ("mixtral", "rwkv", "mamba")  # nor for LoRA without target modules


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
@pytest.mark.parametrize("model_type", [name for name in CONFIGS if name not in NOT_FOR_SOFT_PROMPTS])
def test_texts_fit_into_every_model(model_type, method, make_args, tokenizers, caplog):
    """`max_length` beyond the model's positions, or none: what does not fit is cut, which virtual tokens count for."""
    model = tiny_model(model_type)
    family = model_family(model)
    options = {"num_virtual_tokens": N_VIRTUAL} if method == "prompt_tuning" else {}
    args = make_args(
        peft_method=method,
        peft_kwargs=options,
        max_steps=1,
        max_length=None if method == "lora" else 1000,
        truncation_mode="keep_end",
    )
    rows = Dataset.from_list(ROWS)
    with caplog.at_level(logging.WARNING):
        trainer = LeftTrainer(
            model, args, train_dataset=rows, eval_dataset={"a": rows}, processing_class=tokenizers[family]
        )
    assert trainer.train().training_loss > 0
    trainer.evaluate()
    longest = max(map(len, trainer.train_dataset["input_ids"]))
    if model_type in WITHOUT_POSITIONS:
        assert longest > N_POSITIONS
        assert not any(trainer.cut_rows.values())
        return
    assert longest == N_POSITIONS - options.get("num_virtual_tokens", 0)
    n_sources = 1 if family == "encoder_decoder" else 2  # before a long target, the prompt is cut with keep_end
    assert trainer.cut_rows["train"] == CutRows(4, sources=n_sources, targets=1)
    # Of a row that would have no prompt left, an evaluation keeps the prompt.
    assert trainer.cut_rows["eval_a"] == CutRows(4, sources=1, targets=1)
    (said,) = [record.message for record in caplog.records if "too long" in record.message]
    assert said.startswith("Texts that are too long were cut: ")
    assert "of the train rows; " in said


def test_limits_of_two_kinds_of_positions():
    """LED has tables of different lengths, two models in one have configs of their own."""
    from transformers import AutoConfig, EncoderDecoderConfig

    led = AutoConfig.for_model("led", max_encoder_position_embeddings=64, max_decoder_position_embeddings=32)
    assert position_limits(led) == Limits(64, 32)
    parts = [AutoConfig.for_model("bert", max_position_embeddings=size, is_decoder=True) for size in (48, 24)]
    assert position_limits(EncoderDecoderConfig.from_encoder_decoder_configs(*parts)) == Limits(48, 24)
    assert position_limits(AutoConfig.for_model("xlnet")) == Limits(None, None)
    llama = AutoConfig.for_model("llama", max_position_embeddings=64)
    assert position_limits(llama) == Limits(None, None)
    assert position_limits(llama, with_rotary=True) == Limits(64, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_counts_of_a_task_come_from_where_it_cuts(family, make_args, saved_models, tmp_path):
    """Sources of a task are cut around its prompt: 12 of 65 for soft prompts and none for LoRA, for example."""
    sizes = [1, 1, 15, 300]  # the third fits, but not beside a soft prompt
    rows = [{"document": "word " * size, "summary": "the end"} for size in sizes]
    path = str(tmp_path / "rows.jsonl")
    Dataset.from_list(rows).to_json(path)
    folder = tmp_path / family
    tiny_model("bart" if family == "encoder_decoder" else "gpt2").save_pretrained(folder)
    tokenizer = tiny_tokenizer(family)
    tokenizer.save_pretrained(folder)
    fits = len(tokenizer(rows[2]["document"])["input_ids"])
    assert 40 < fits < N_POSITIONS - 40
    counts = {}
    for method in ("lora", "prompt_tuning"):
        options = {"peft_kwargs": {"num_virtual_tokens": 60}} if method == "prompt_tuning" else {}
        args = make_args(peft_method=method, max_steps=1, overwrite_output_dir=True, max_length=None, **options)
        task = get_task("summarization")
        data = prepare_task_data(task, DataArguments(train_file=path, test_file=path), str(folder), tokenizer, args)
        trainer = LeftTrainer(str(folder), args, train_dataset=data["test"], processing_class=tokenizer)
        trainer.predict(data["test"])
        assert trainer.cut_rows["test"] == trainer.cut_rows["train"]
        assert data["test"]["target"][0] == "the end"
        counts[method] = trainer.cut_rows["test"].sources
    assert 1 <= counts["lora"] < counts["prompt_tuning"]


def test_a_target_of_a_task_that_is_too_long_is_cut(make_args, tmp_path):
    Dataset.from_list([{"document": LONG, "summary": LONG}] * 4).to_json(str(tmp_path / "rows.jsonl"))
    folder = tmp_path / "gpt2"
    tiny_model("gpt2").save_pretrained(folder)
    tokenizer = tiny_tokenizer("decoder_only")
    data = prepare_task_data(
        get_task("summarization"),
        DataArguments(train_file=str(tmp_path / "rows.jsonl")),
        str(folder),
        tokenizer,
        make_args(),
    )
    trainer = LeftTrainer(str(folder), make_args(), train_dataset=data["train"], processing_class=tokenizer)
    assert trainer.cut_rows["train"] == CutRows(3, sources=3, targets=3)
    assert trainer.train_dataset[0]["input_ids"][-1] == tokenizer.eos_token_id
    assert data["train"]["target"][0] == LONG


def test_rows_without_a_target_are_counted_or_refused(make_args, saved_models):
    path, rows = str(saved_models["decoder_only"]), Dataset.from_list(ROWS)
    trainer = LeftTrainer(path, make_args(max_length=40), train_dataset=rows, eval_dataset=rows)
    assert trainer.cut_rows["train"].dropped == 1
    assert len(trainer.train_dataset) == 3
    assert "(1 rows dropped, which kept no target)" in describe_cuts(trainer.cut_rows)
    with pytest.raises(ValueError, match=r"None of the 2 rows of train_dataset keeps a target.*'keep_end'"):
        LeftTrainer(path, make_args(max_length=40), train_dataset=rows.select([1, 1]))


def test_features_that_are_evaluated_again_keep_their_counts(make_args, saved_models):
    rows = Dataset.from_list(ROWS)
    args = make_args(max_length=40, truncation_mode="keep_end")
    trainer = LeftTrainer(str(saved_models["decoder_only"]), args, train_dataset=rows, eval_dataset=rows)
    counted = dict(trainer.cut_rows)
    assert counted["eval"]
    trainer.evaluate(trainer.eval_dataset)
    assert trainer.cut_rows == counted


@pytest.mark.parametrize("packing", [False, True])
def test_shuffled_and_packed_rows_are_counted_too(packing, make_args, saved_models):
    args = make_args(max_length=40, truncation_mode="keep_end", shuffle_dataset=True, packing=packing)
    rows = Dataset.from_list(ROWS)
    trainer = LeftTrainer(str(saved_models["decoder_only"]), args, train_dataset=rows, eval_dataset=rows)
    assert max(map(len, trainer.train_dataset["input_ids"])) <= 40
    assert bool(trainer.cut_rows["train"]) != packing  # packing cuts what it joins, and loses nothing
    assert "source_was_cut" not in trainer.train_dataset.column_names


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_rows_are_cut_and_not_counted(family, make_args, tokenizers):
    rows = IterableDataset.from_generator(lambda: iter(ROWS))
    model = tiny_model("bart" if family == "encoder_decoder" else "gpt2")
    args = make_args(max_steps=1, max_length=None, per_device_train_batch_size=2)
    trainer = LeftTrainer(model, args, train_dataset=rows, processing_class=tokenizers[family])
    trainer.train()
    assert losses(trainer)[0] > 0
    assert trainer.cut_rows == {}


@pytest.mark.parametrize("column", ["input_ids", "labels"])
@pytest.mark.parametrize("argument", ["train_dataset", "eval_dataset"])
def test_tokens_that_do_not_fit_are_refused(argument, column, make_args, tmp_path, no_weights):
    """They are not cut: a decoder-only model's are, as TRL does it."""
    tiny_model("bart").save_pretrained(tmp_path)
    tiny_tokenizer("encoder_decoder").save_pretrained(tmp_path)
    short = {"input_ids": [5, 1], "labels": [6, 1]}
    data = dict.fromkeys(("train_dataset", "eval_dataset"), Dataset.from_list([short]))
    data[argument] = Dataset.from_list([short, {**short, column: [5] * 120}])
    LeftTrainer(tiny_model("bart"), make_args(), **data, processing_class=tiny_tokenizer("encoder_decoder"))
    config = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=9)
    message = rf"1 of 2 rows of {argument} have more than 119 {column}.*max_length=119"
    if column == "labels":  # the virtual tokens stand before the source
        data[argument] = Dataset.from_list([short, {**short, column: [5] * 129}])
        message = rf"1 of 2 rows of {argument} have more than 128 labels"
    with pytest.raises(ValueError, match=message):
        LeftTrainer(str(tmp_path), make_args(), **data, peft_config=config)


def test_a_method_that_leaves_no_position_is_refused(rows, make_args, tmp_path, no_weights):
    tiny_model("bart").save_pretrained(tmp_path)
    tiny_tokenizer("encoder_decoder").save_pretrained(tmp_path)
    args = make_args(peft_method="prompt_tuning", peft_kwargs={"num_virtual_tokens": 128})
    with pytest.raises(ValueError, match=r"takes 128 positions, and model=.* has 128.*Lower num_virtual_tokens"):
        LeftTrainer(str(tmp_path), args, train_dataset=rows)
