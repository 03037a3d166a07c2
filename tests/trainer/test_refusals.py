"""What LeftTrainer refuses, before weights are loaded wherever they are not needed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    T5EncoderModel,
)

from left_trainer import LeftSeq2SeqTrainer, LeftSFTTrainer, LeftTrainer
from left_trainer.adapters.files import TRAINING_STATE_FILE
from tiny import tiny_model


@pytest.mark.parametrize(
    "model",
    [
        lambda: BertForMaskedLM(BertConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)),
        lambda: T5EncoderModel(tiny_model("t5").config),
    ],
)
def test_models_that_generate_nothing_are_refused(model, rows, make_args, tokenizers):
    with pytest.raises(ValueError, match="LeftTrainer fine-tunes models that generate text"):
        LeftTrainer(model(), make_args(), train_dataset=rows, processing_class=tokenizers["decoder_only"])


def test_bidirectional_bert_with_a_causal_head_is_refused(rows, make_args, tokenizers):
    config = BertConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="encoder-only"):
        LeftTrainer(
            BertLMHeadModel(config), make_args(), train_dataset=rows, processing_class=tokenizers["decoder_only"]
        )


def test_misrouting_is_refused(rows, make_args, tokenizers):
    with pytest.raises(ValueError, match="Use LeftTrainer"):
        LeftSFTTrainer(tiny_model("bart"), make_args(), train_dataset=rows, processing_class=tokenizers["decoder_only"])
    with pytest.raises(ValueError, match="Use LeftTrainer"):
        LeftSeq2SeqTrainer(tiny_model("llama"), make_args(), train_dataset=rows)


def test_not_a_model(make_args):
    with pytest.raises(TypeError, match="model is a int"):
        LeftTrainer(3, make_args())
    with pytest.raises(ValueError, match="neither a directory"):
        LeftTrainer("no/such-model", make_args())


def test_a_merged_adapter_is_refused_also_beside_another(rows, make_args, tokenizers):
    """The layers of a model with merged weights call no adapter: what else is trained would be all that learns."""
    model = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM"))
    model.merge_adapter(["other"])
    arguments = {"train_dataset": rows, "processing_class": tokenizers["decoder_only"]}
    with pytest.raises(ValueError, match=r"'other' merged into .* model\.unmerge_adapter\(\)"):
        LeftTrainer(model, make_args(), **arguments)
    model.unmerge_adapter()
    LeftTrainer(model, make_args(), **arguments)


def test_p_tuning_without_its_sidecar_is_refused(rows, make_args, saved_models, tmp_path):
    trainer = LeftTrainer(str(saved_models["encoder_decoder"]), make_args(peft_method="p_tuning"), train_dataset=rows)
    trainer.save_model(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / TRAINING_STATE_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="saves only what inference needs"):
        LeftTrainer(str(tmp_path / "adapter"), make_args(), train_dataset=rows)


def test_a_frozen_peft_model_is_refused(rows, make_args, tokenizers):
    model = get_peft_model(tiny_model("t5"), LoraConfig(task_type="SEQ_2_SEQ_LM", inference_mode=True))
    with pytest.raises(ValueError, match="is_trainable=True"):
        LeftTrainer(model, make_args(), train_dataset=rows, processing_class=tokenizers["encoder_decoder"])
    model = get_peft_model(tiny_model("t5"), LoraConfig(task_type="SEQ_2_SEQ_LM"))
    with pytest.raises(ValueError, match=r"model\.unload\(\)"):
        LeftTrainer(
            model,
            make_args(),
            train_dataset=rows,
            processing_class=tokenizers["encoder_decoder"],
            peft_config=LoraConfig(),
        )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "train_dataset is empty"),
        ([{"question": "a", "answer": "b"}], "has the columns 'question', 'answer'"),
        ([{"prompt": "a", "completion": " "}], "Row 0 of train_dataset has an empty 'completion'"),
        ([{"input_ids": [1, 2], "labels": [-100, -100]}], "Row 0 of train_dataset has an empty 'labels'"),
    ],
)
def test_unusable_data(data, message, make_args, saved_models, no_weights):
    with pytest.raises(ValueError, match=message):
        LeftTrainer(str(saved_models["encoder_decoder"]), make_args(), train_dataset=Dataset.from_list(data))


def test_fp16_is_refused_for_t5_before_weights_load(rows, make_args, saved_models, no_weights):
    args = make_args()
    args.fp16 = True  # the field itself needs a GPU
    with pytest.raises(ValueError, match="Use bf16=True"):
        LeftTrainer(str(saved_models["encoder_decoder"]), args, train_dataset=rows)


def test_prefix_tuning_with_gradient_checkpointing_is_refused(rows, make_args, saved_models, no_weights):
    args = make_args(peft_method="prefix_tuning", activation_checkpointing=True)
    with pytest.raises(ValueError, match="gradient_checkpointing=False"):
        LeftTrainer(str(saved_models["encoder_decoder"]), args, train_dataset=rows)


@pytest.mark.parametrize(("field", "value"), [("packing", True), ("dataset_text_field", "x"), ("loss_type", "dft")])
def test_fields_without_effect_are_refused(field, value, rows, make_args, saved_models, no_weights):
    with pytest.raises(ValueError, match=f"{field}=.* has no effect on an encoder-decoder model"):
        LeftTrainer(str(saved_models["encoder_decoder"]), make_args(**{field: value}), train_dataset=rows)
    with pytest.raises(ValueError, match="group_by_length"):
        LeftTrainer(str(saved_models["decoder_only"]), make_args(sortish_sampler=True), train_dataset=rows)


def test_tokenizer_without_pad_token(rows, make_args, saved_models, tokenizers, no_weights):
    tokenizer = copy.deepcopy(tokenizers["encoder_decoder"])
    tokenizer.pad_token = None
    path = str(saved_models["encoder_decoder"])
    with pytest.raises(ValueError, match=r"tokenizer\.pad_token = '</s>'"):
        LeftTrainer(path, make_args(), train_dataset=rows, processing_class=tokenizer)
    with pytest.raises(ValueError, match="not in the tokenizer's vocabulary"):
        LeftTrainer(path, make_args(pad_token="nope"), train_dataset=rows, processing_class=tokenizer)


def test_vocabulary_mismatch(rows, make_args, saved_models, tokenizers, no_weights):
    tokenizer = copy.deepcopy(tokenizers["encoder_decoder"])
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(301\)"):
        LeftTrainer(str(saved_models["encoder_decoder"]), make_args(), train_dataset=rows, processing_class=tokenizer)


def test_a_pattern_that_matches_nothing_is_refused_before_weights_load(rows, make_args, saved_models, no_weights):
    args = make_args(peft_kwargs={"target_modules": ["q", "w_typo"]})
    with pytest.raises(ValueError, match=r"'w_typo', which matches no module.*modules named.*k, .*o, q"):
        LeftTrainer(str(saved_models["encoder_decoder"]), args, train_dataset=rows)


def test_an_output_dir_with_a_result_is_not_overwritten(rows, make_args, saved_models, monkeypatch):
    path = str(saved_models["encoder_decoder"])
    trainer = LeftTrainer(path, make_args(), train_dataset=rows)
    trainer.save_model()
    adapter = Path(trainer.args.output_dir, "adapter_model.safetensors")
    content = adapter.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite_output_dir=True"):
        LeftTrainer(path, make_args(), train_dataset=rows).train()
    assert adapter.read_bytes() == content
    LeftTrainer(path, make_args(overwrite_output_dir=True), train_dataset=rows).train()


def test_an_output_dir_that_cannot_be_written(rows, make_args, saved_models, tmp_path, no_weights):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="Not a directory"):
        LeftTrainer(
            str(saved_models["encoder_decoder"]),
            make_args(output_dir=str(tmp_path / "file" / "run")),
            train_dataset=rows,
        )
