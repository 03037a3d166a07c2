"""Loss and gradient norm do not depend on how a batch is split over accumulation steps."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from left_trainer import LeftTrainer
from left_trainer.models import model_family
from log_history import gradient_norms, losses
from tiny import ENCODER_DECODER_TYPES, tiny_model

SPLITS = ((8, 1), (2, 4), (1, 8))


def train(model_type, rows, make_args, tokenizers, batch_size, accumulation, **overrides):
    model = tiny_model(model_type)
    args = make_args(
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        max_grad_norm=1e9,
        save_strategy="no",
        overwrite_output_dir=True,
        **overrides,
    )
    tokenizer = tokenizers[model_family(model)]
    trainer = LeftTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return torch.tensor([losses(trainer), gradient_norms(trainer)], dtype=torch.float64)


@pytest.mark.parametrize("model_type", [*ENCODER_DECODER_TYPES, "llama", "gpt2"])
def test_splits_of_a_batch_agree(model_type, rows, make_args, tokenizers):
    results = [train(model_type, rows, make_args, tokenizers, *split) for split in SPLITS]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_splits_agree_with_label_smoothing_and_full_fine_tuning(model_type, rows, make_args, tokenizers):
    options = {"label_smoothing_factor": 0.1, "peft_method": "full"}
    results = [train(model_type, rows, make_args, tokenizers, *split, **options) for split in SPLITS]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=0)


def test_the_plain_trainer_still_needs_this(rows, make_args, tokenizers, tmp_path):
    """When this fails, transformers has mended T5's loss and `accumulated_token_loss` may go."""
    trainer = LeftTrainer(
        tiny_model("t5"), make_args(), train_dataset=rows, processing_class=tokenizers["encoder_decoder"]
    )
    features: Dataset = trainer.train_dataset.select(range(8))
    first_losses = []
    for batch_size, accumulation in SPLITS:
        args = Seq2SeqTrainingArguments(
            output_dir=str(tmp_path / "plain"),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        plain = Seq2SeqTrainer(tiny_model("t5"), args, train_dataset=features, data_collator=trainer.data_collator)
        plain.train()
        first_losses += losses(plain)
    assert first_losses[1] > 3 * first_losses[0]
    assert first_losses[2] > 6 * first_losses[0]
