"""`neftune_noise_alpha` puts noise on the input of every model type, with every kind of method."""

from __future__ import annotations

import pytest
import torch
from transformers import FSMTConfig, FSMTForConditionalGeneration

from left_trainer import LeftTrainer
from left_trainer.models import model_family
from left_trainer.trainer.neftune import input_tables
from log_history import losses
from tiny import CONFIGS, TINY_BART, tiny_model


def model_of(model_type):
    if model_type != "fsmt":
        return tiny_model(model_type)
    languages = {"src_vocab_size": 300, "tgt_vocab_size": 300, "langs": ["en", "de"]}
    return FSMTForConditionalGeneration(FSMTConfig(**{**TINY_BART, **languages}))


def called(model):
    """How often each of the tables is called in a forward pass of the trainer."""
    counts = [0] * len(input_tables(model))
    for index, table in enumerate(input_tables(model)):
        table.register_forward_hook(lambda *_, index=index: counts.__setitem__(index, counts[index] + 1))
    return counts


@pytest.mark.parametrize("model_type", [*CONFIGS, "fsmt"])
@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_noise_is_added_once(model_type, method, rows, make_args, tokenizers):
    results = {}
    for alpha in (None, 5.0):
        model = model_of(model_type)
        args = make_args(peft_method=method, neftune_noise_alpha=alpha, max_steps=1, learning_rate=1e-9)
        trainer = LeftTrainer(model, args, train_dataset=rows, processing_class=tokenizers[model_family(model)])
        counts = called(trainer.model)
        trainer.train()
        assert sum(counts) == 1
        results[alpha] = losses(trainer)[0]
        handles = [table._forward_hooks for table in input_tables(trainer.model)]
        assert sum(len(hooks) for hooks in handles) == len(handles)  # those of this test
    assert results[5.0] != pytest.approx(results[None], abs=1e-7)


def test_a_model_that_calls_no_embedding_is_refused(rows, make_args, tokenizers):
    model = tiny_model("llama")
    forward, weight = model.model.forward, model.model.embed_tokens.weight

    def with_a_function(input_ids=None, inputs_embeds=None, **inputs):
        return forward(inputs_embeds=torch.nn.functional.embedding(input_ids, weight), **inputs)

    model.model.forward = with_a_function
    args = make_args(neftune_noise_alpha=5.0, max_steps=1, peft_method="full")
    trainer = LeftTrainer(model, args, train_dataset=rows, processing_class=tokenizers["decoder_only"])
    with pytest.raises(RuntimeError, match="neftune_noise_alpha=5 has no effect"):
        trainer.train()
