"""Positions that a record claims are those that the model really uses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig

from left_trainer import (
    DataArguments,
    LeftTrainer,
    PeftMethod,
    apply_method,
    get_method,
    get_task,
    list_methods,
    load_tokenizer,
    prepare_task_data,
)
from left_trainer.adapters.task_ids import task_inputs
from left_trainer.methods.apply import find_method
from left_trainer.methods.virtual_tokens import Positions
from left_trainer.models import model_family
from method_settings import apply_or_skip
from tiny import tiny_model, tiny_tokenizer

SOURCE_LENGTH, TARGET_LENGTH = 7, 4
# Learned absolute positions: the tables, and how many rows of a table stand before the first position.
POSITION_TABLES = {
    "gpt2": (("transformer.wpe",), 0),
    "opt": (("model.decoder.embed_positions",), 2),
    "bart": (("model.encoder.embed_positions", "model.decoder.embed_positions"), 2),
}


def used_positions(model, model_type, monkeypatch) -> list[int]:
    """How many positions of each table a forward pass for training uses."""
    names, offset = POSITION_TABLES[model_type]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tables = [base.get_submodule(name).weight for name in names]
    largest = [0] * len(tables)
    original = torch.nn.functional.embedding

    def embedding(input, weight, *args, **kwargs):
        for index, table in enumerate(tables):
            if weight is table:
                largest[index] = max(largest[index], int(input.max()) + 1 - offset)
        return original(input, weight, *args, **kwargs)

    monkeypatch.setattr("torch.nn.functional.embedding", embedding)
    ids = torch.arange(5, 5 + SOURCE_LENGTH)[None].repeat(2, 1)
    labels = ids[:, :TARGET_LENGTH].contiguous() if len(tables) > 1 else ids
    model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, **task_inputs(model, 2))
    return largest


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # FRoD, from torch
@pytest.mark.parametrize("model_type", list(POSITION_TABLES))
@pytest.mark.parametrize("method", [method.name for method in list_methods()])
def test_positions_of_every_method_equal_what_the_model_really_gets(method, model_type, tmp_path, monkeypatch):
    if (method, model_type) == ("adaption_prompt", "opt"):
        pytest.skip("PEFT implements it for Llama, Mistral and GPT-2")
    model = apply_or_skip(method, model_type, tmp_path, seed=0)
    record = find_method(model)
    assert record is get_method(method)
    # For CPT the config, because the length of the context comes from the data.
    options = {"cpt_token_ids": model.active_peft_config.cpt_token_ids} if method == "cpt" else {}
    positions = record.positions(options, model_family(model))
    expected = [SOURCE_LENGTH + positions.source]
    if model_type == "bart":
        expected.append(TARGET_LENGTH + positions.target)
    assert used_positions(model, model_type, monkeypatch) == expected


def test_prompts_that_generate_leaves_out_are_refused():
    with pytest.raises(ValueError, match="trains prompts before the decoder's input"):
        apply_method(tiny_model("bart"), "multitask_prompt_tuning", {"num_transformer_submodules": 2})


def test_prompts_behind_the_input_of_a_decoder_are_refused():
    with pytest.raises(ValueError, match="has no encoder"):
        apply_method(tiny_model("llama"), "prompt_tuning", {"prompt_position": "after"})


def test_positions_by_family():
    assert get_method("prefix_tuning").positions({"num_virtual_tokens": 3}, "decoder_only") == Positions(source=3)
    assert get_method("prefix_tuning").positions({"num_virtual_tokens": 3}, "encoder_decoder") == Positions(target=3)
    assert get_method("prompt_tuning").positions({}, "encoder_decoder") == Positions(source=20)
    assert get_method("cpt").positions({}, "decoder_only") == Positions(source=32)
    for method in ("p_tuning_v2", "adaption_prompt", "lora"):
        assert get_method(method).positions({}, "decoder_only") == Positions()


def test_a_record_of_a_soft_prompt_says_where_its_tokens_stand():
    fields = {field.name: getattr(get_method("lora"), field.name) for field in dataclasses.fields(PeftMethod)}
    with pytest.raises(ValueError, match="virtual_tokens=BEFORE_INPUT"):
        PeftMethod(**{**fields, "name": "mine", "config_class": PromptTuningConfig})


def long_rows(method, make_args, tmp_path, **options):
    """A trainer on a GPT-2 of 128 positions, and rows whose source is longer."""
    folder = tmp_path / "gpt2"
    tiny_model("gpt2").save_pretrained(folder)
    tiny_tokenizer("decoder_only").save_pretrained(folder)
    Dataset.from_list([{"document": "word " * 500, "summary": "the end"}] * 4).to_json(str(tmp_path / "rows.jsonl"))
    args = make_args(peft_method=method, max_steps=1, **options)
    tokenizer, rows = load_tokenizer(folder), DataArguments(train_file=str(tmp_path / "rows.jsonl"))
    data = prepare_task_data(get_task("summarization"), rows, str(folder), tokenizer, args)
    return LeftTrainer(str(folder), args, train_dataset=data["train"], processing_class=tokenizer)


def test_cpt_trains_on_rows_longer_than_the_models_positions(make_args, tmp_path):
    trainer = long_rows("cpt", make_args, tmp_path)
    trainer.train()
    assert 80 <= len(trainer.train_dataset[0]["input_ids"]) <= 128 - 32


def test_p_tuning_v2_reserves_nothing(make_args, tmp_path):
    trainer = long_rows("p_tuning_v2", make_args, tmp_path, peft_kwargs={"num_virtual_tokens": 20})
    trainer.train()
    assert 128 - 20 < len(trainer.train_dataset[0]["input_ids"]) <= 128
