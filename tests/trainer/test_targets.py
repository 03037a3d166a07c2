"""What a model learns to write: the whole target and its end, whatever stands in it, beside it, or around it."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq

from left_trainer import LeftTrainer
from left_trainer.models import FAMILIES
from log_history import losses
from tiny import ENCODER_DECODER_TYPES, FAMILY_TYPES, fsmt_model, tiny_model, tiny_rows

END = "</s>"
COMPLETIONS = (" plain", f" {END} in front", f" in {END} between", f" behind {END}", f" behind and a space {END} ", END)
BESIDE = {
    "text": "a text beside",
    "messages": [{"role": "user", "content": "hi"}],
    "conversations": [{"from": "human", "value": "hi"}],
    "chosen": [{"role": "user", "content": "hi"}],
    "id": 7,
}


@pytest.mark.parametrize("beside", [(), *((name,) for name in BESIDE), tuple(BESIDE)], ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_target_ends(family, beside, make_args, tokenizers):
    """Whatever the target's text contains, and whatever columns stand beside it."""
    others = {name: BESIDE[name] for name in beside}
    rows = Dataset.from_list([{"prompt": "say", "completion": text, **others} for text in COMPLETIONS])
    tokenizer = tokenizers[family]
    trainer = LeftTrainer(tiny_model(FAMILY_TYPES[family]), make_args(), train_dataset=rows, processing_class=tokenizer)
    for text, features in zip(COMPLETIONS, trainer.train_dataset, strict=True):
        labels = [label for label in features["labels"] if label != -100]
        assert labels[-1] == tokenizer.eos_token_id, text
        if END not in text:
            assert labels.count(tokenizer.eos_token_id) == 1, text


@pytest.mark.parametrize("text_field", ["text", "content"])
def test_what_formatting_func_returns_ends(text_field, make_args, tokenizers):
    rows = Dataset.from_list([{"prompt": "a", "answer": "b", text_field: "beside"}] * 4)
    trainer = LeftTrainer(
        tiny_model("llama"),
        make_args(dataset_text_field=text_field),
        train_dataset=rows,
        processing_class=tokenizers["decoder_only"],
        formatting_func=lambda row: f"{row['prompt']} then {row['answer']}",
    )
    ids = trainer.train_dataset[0]["input_ids"]
    assert tokenizers["decoder_only"].decode(ids) == f"<s>a then b{END}"


def test_a_tokenizer_without_an_end_is_refused(rows, make_args, saved_models, tokenizers, no_weights):
    tokenizer = copy.deepcopy(tokenizers["decoder_only"])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no end-of-sequence token.*--eos_token"):
        LeftTrainer(str(saved_models["decoder_only"]), make_args(), train_dataset=rows, processing_class=tokenizer)


def first_losses(model, make_args, tokenizer, collator=None):
    trainer = LeftTrainer(
        model,
        make_args(max_steps=2, train_sampling_strategy="sequential", overwrite_output_dir=True),
        train_dataset=Dataset.from_list(tiny_rows(8)),
        processing_class=tokenizer,
        data_collator=collator,
    )
    trainer.train()
    return [*losses(trainer), trainer.evaluate(Dataset.from_list(tiny_rows(8)))["eval_loss"]]


@pytest.mark.parametrize("model_type", ENCODER_DECODER_TYPES)
def test_a_tokenizer_that_pads_on_the_left_changes_nothing(model_type, make_args, tokenizers):
    right = tokenizers["encoder_decoder"]
    left = copy.deepcopy(right)
    left.padding_side = "left"
    expected = first_losses(tiny_model(model_type), make_args, right)
    assert first_losses(tiny_model(model_type), make_args, left) == pytest.approx(expected, abs=1e-6)
    collator = DataCollatorForSeq2Seq(left, label_pad_token_id=-100)
    assert first_losses(tiny_model(model_type), make_args, left, collator) == pytest.approx(expected, abs=1e-6)
    assert (left.padding_side, collator.tokenizer) == ("left", left)


@pytest.mark.parametrize("make_model", [fsmt_model, lambda: tiny_model("bart"), lambda: tiny_model("t5")])
def test_a_collator_with_the_model_changes_nothing(make_model, make_args, tokenizers):
    """FSMT writes padding into the labels that such a collator shows it."""
    tokenizer, model = tokenizers["encoder_decoder"], make_model()
    expected = first_losses(make_model(), make_args, tokenizer)
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    assert first_losses(model, make_args, tokenizer, collator) == pytest.approx(expected, abs=1e-6)
    assert collator.model is not None


def test_a_collator_of_the_user_stays_what_it_is(rows, make_args, tokenizers):
    class Collator(DataCollatorForSeq2Seq):
        def __call__(self, features, return_tensors=None):
            assert self.model is not None
            return super().__call__(features, return_tensors)

    tokenizer, model = tokenizers["encoder_decoder"], tiny_model("t5")
    collator = Collator(tokenizer, model=model)
    trainer = LeftTrainer(model, make_args(), train_dataset=rows, processing_class=tokenizer, data_collator=collator)
    assert isinstance(trainer.data_collator, Collator)
    assert torch.is_tensor(next(iter(trainer.get_train_dataloader()))["decoder_input_ids"])
