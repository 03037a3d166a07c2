"""What transformers' FSMT still does in a way of its own, and left_trainer evens out."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import FSMTConfig, FSMTForConditionalGeneration, PreTrainedModel

from package_walk import home


@pytest.fixture
def model() -> PreTrainedModel:
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32}
    config = FSMTConfig(langs=["en", "de"], src_vocab_size=50, tgt_vocab_size=50, **sizes, **heads, **layers)
    return FSMTForConditionalGeneration(config).eval()


def test_the_decoder_of_fsmt_reads_the_source(model):
    source, labels = torch.tensor([[5, 6, 7, 8, 2]]), torch.tensor([[9, 10, 2]])
    shifted = torch.tensor([[2, 9, 10]])
    assert model(input_ids=source, labels=labels, decoder_input_ids=shifted).logits.shape[1] == labels.shape[1]
    target_length = 0
    with contextlib.suppress(ValueError):
        target_length = model(input_ids=source, labels=labels).logits.shape[1]
    assert target_length != labels.shape[1], (
        f"FSMT now makes its decoder's input of the labels: remove {home('with_decoder_inputs')}."
    )


def test_fsmt_writes_into_the_labels_that_it_shifts(model):
    labels = torch.tensor([[9, 10, 2, -100]])
    model.prepare_decoder_input_ids_from_labels(labels)
    assert labels.eq(-100).sum() == 0, f"FSMT leaves labels alone now: remove the clone in {home('decoder_input_ids')}."


def test_the_decoder_of_fsmt_sees_what_follows_where_there_are_no_ids(model):
    embeddings, targets = model.get_encoder().embed_tokens(torch.tensor([[5, 6, 2]])), torch.tensor([[2, 9, 10]])

    def first_logits(last: int) -> torch.Tensor:
        targets[0, -1] = last
        inputs = {"inputs_embeds": embeddings, "decoder_input_ids": targets, "labels": targets, "use_cache": False}
        return model(**inputs).logits[0, 0]

    with torch.no_grad():
        assert not torch.equal(first_logits(11), first_logits(12)), (
            f"FSMT now masks what follows: remove input_ids from {home('KEPT_INPUTS')}."
        )
