"""How rows become token ids and labels."""

from __future__ import annotations

from datasets import Dataset

from left_trainer.data.features import tokenize_pairs
from left_trainer.models.positions import Limits


def test_labels_end_once(tokenizers):
    tokenizer = tokenizers["encoder_decoder"]
    rows = Dataset.from_list([{"prompt": "a", "completion": " b" * n} for n in (1, 40)])
    for features in tokenize_pairs(rows, tokenizer, Limits(8, 8)):
        assert features["labels"][-1] == tokenizer.eos_token_id
        assert features["labels"].count(tokenizer.eos_token_id) == 1
        assert len(features["labels"]) <= 8
    decoder = tokenizers["decoder_only"]  # adds no end by itself, as some encoder-decoder tokenizers do not
    assert tokenize_pairs(rows, decoder, Limits(8, 8))[1]["labels"][-1] == decoder.eos_token_id
    assert len(tokenize_pairs(rows, decoder, Limits(8, 8))[1]["labels"]) == 8


def test_truncation_keeps_the_side_that_was_asked_for(tokenizers):
    rows = Dataset.from_list([{"prompt": "first " + "and " * 50 + "last", "completion": "x"}])
    tokenizer = tokenizers["encoder_decoder"]
    start = tokenizer.decode(tokenize_pairs(rows, tokenizer, Limits(8, 8), "keep_start")[0]["input_ids"])
    end = tokenizer.decode(tokenize_pairs(rows, tokenizer, Limits(8, 8), "keep_end")[0]["input_ids"])
    assert start.startswith("fir")
    assert "ast" in end
    assert tokenizer.truncation_side == "right"
