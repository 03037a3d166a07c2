"""What TRL still does wrong, and which of its internals left_trainer uses."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from package_walk import home
from tiny import tiny_model, tiny_rows, tiny_tokenizer

ROWS = Dataset.from_list(tiny_rows(4))


@pytest.fixture
def make_trainer(tmp_path):
    def make(model: Any = None, **options: Any) -> SFTTrainer:
        args = SFTConfig(
            str(tmp_path),
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            max_steps=1,
            bf16=False,
            use_cpu=True,
        )
        model = model or tiny_model("llama")
        return SFTTrainer(model, args, train_dataset=ROWS, processing_class=tiny_tokenizer("decoder_only"), **options)

    return make


def test_the_adapter_of_a_quantized_model_is_rounded(make_trainer):
    model = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM"))
    model.get_base_model().is_loaded_in_4bit = True
    make_trainer(model)
    adapter = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    assert adapter.dtype == torch.bfloat16, (
        f"trl now leaves the adapter of a quantized model in its precision: remove {home('unrounded_adapter')}."
    )


def test_rows_for_predict_are_not_prepared(make_trainer):
    trainer, works = make_trainer(), False
    trainer.evaluate(ROWS)
    with contextlib.suppress(KeyError, ValueError, IndexError):
        trainer.predict(ROWS)
        works = True
    assert not works, f"SFTTrainer now prepares the rows of predict: remove _features of {home('LeftSFTTrainer')}."


def test_rows_of_a_batch_are_joined_by_a_collator_that_can_be_replaced():
    rows = [{"input_ids": [5, 6]}, {"input_ids": [7]}]
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    who = f"which {home('one_row_for_each_prompt')} relies on"
    assert len(collator(rows)["input_ids"]) == 1, f"trl's padding_free no longer joins the rows of a batch, {who}."
    apart = dataclasses.replace(collator, padding_free=False)
    assert len(apart(rows)["input_ids"]) == 2, f"trl's collator no longer takes padding_free=False, {who}."


def test_the_metrics_of_tokens_are_kept_where_we_write_them(make_trainer):
    trainer, who = make_trainer(), f"where {home('log_token_metrics')} writes"
    assert {"train", "eval"} <= set(getattr(trainer, "_metrics", ())), f"SFTTrainer keeps no _metrics any more, {who}."
    assert getattr(trainer, "_total_train_tokens", None) == 0, (
        f"SFTTrainer counts no _total_train_tokens any more, {who}."
    )
    trainer.model.train()
    trainer._metrics["train"]["mean_token_accuracy"].append(0.5)
    trainer._metrics["train"]["num_tokens"] = [7]
    trainer.log({})
    logged = trainer.state.log_history[-1]
    assert (logged["mean_token_accuracy"], logged["num_tokens"]) == (0.5, 7), (
        f"SFTTrainer logs no _metrics any more, {who}."
    )


def test_rows_are_prepared_as_we_ask(make_trainer):
    trainer = make_trainer()
    names = list(inspect.signature(SFTTrainer._prepare_dataset).parameters)
    assert names[1:] == ["dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"], (
        f"SFTTrainer's _prepare_dataset has other parameters now, which _features of {home('LeftSFTTrainer')} passes."
    )
    assert hasattr(trainer, "_formatting_func"), (
        f"SFTTrainer keeps no _formatting_func any more, which _features of {home('LeftSFTTrainer')} passes on."
    )
    assert trainer.completion_only_loss is True, (
        "SFTTrainer sets no completion_only_loss any more, by which _features of "
        f"{home('LeftSFTTrainer')} knows that its parent is made."
    )


def test_columns_are_kept_by_the_list_that_we_extend(make_trainer):
    trainer, who = make_trainer(), f"which {home('_set_signature_columns_if_needed')} extends"
    trainer._signature_columns = None
    trainer._set_signature_columns_if_needed()
    assert "input_ids" in (trainer._signature_columns or ()), f"SFTTrainer fills no _signature_columns any more, {who}."


def test_a_field_may_be_a_dict_in_json(tmp_path):
    @dataclasses.dataclass
    class Arguments(SFTConfig):
        _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "options"]
        options: dict | str | None = None

    assert Arguments(str(tmp_path), options='{"r": 2}', use_cpu=True, bf16=False).options == {"r": 2}, (
        "Fields in _VALID_DICT_FIELDS are no longer read as JSON, to which "
        f"{home('LeftTrainingArguments')} adds peft_kwargs."
    )


def test_the_end_of_a_completion_goes_onto_another_column(make_trainer):
    trainer = make_trainer()
    rows = ROWS.add_column("text", ["beside"] * len(ROWS))
    features = trainer._prepare_dataset(rows, trainer.processing_class, trainer.args, False, None, "train")
    assert features[0]["input_ids"][-1] != trainer.processing_class.eos_token_id, (
        f"trl now ends the completion whatever stands beside it: remove {home('columns_of_other_forms')}."
    )


def test_the_output_head_of_a_model_is_replaced_for_a_loss():
    from trl.trainer.utils import add_fused_lm_head

    model, ids = tiny_model("llama"), torch.tensor([[5, 6, 7, 1]])
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    outputs = model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert outputs.log_probs is not None, f"TRL's loss has another form: mend {home('prepare_fresh_model')}."
