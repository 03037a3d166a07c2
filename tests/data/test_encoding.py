"""Tokens of many texts: those of the tokenizer's own call, whatever it was asked before."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from left_trainer.data.encoding import token_ids
from left_trainer.models import FAMILIES
from tiny import tiny_tokenizer

TEXTS = ["red", "", "red", "and so on " * 100, "été </s> <s>", "\n a  b\t"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("argument", ["text", "text_target"])
def test_as_the_tokenizer_itself(family, argument):
    tokenizer = tiny_tokenizer(family)
    expected = tokenizer(**{argument: TEXTS})["input_ids"]
    assert token_ids(tokenizer, TEXTS, argument) == expected
    tokenizer(TEXTS, truncation=True, max_length=3, padding="max_length")
    assert token_ids(tokenizer, TEXTS, argument) == expected
    assert token_ids(tokenizer, [], argument) == []


def test_a_tokenizer_that_does_more_than_its_backend_is_called():
    class Upper(PreTrainedTokenizerFast):
        def __call__(self, text=None, **options):
            return super().__call__([each.upper() for each in text] if isinstance(text, list) else text, **options)

    tokenizer = tiny_tokenizer("decoder_only")
    upper = Upper(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", pad_token="<pad>")
    assert token_ids(upper, ["red"]) == tokenizer(["RED"])["input_ids"]


def test_targets_that_begin_otherwise():
    class Marked(PreTrainedTokenizerFast):
        def _switch_to_target_mode(self):
            self.backend_tokenizer.post_processor = tiny_tokenizer("encoder_decoder").backend_tokenizer.post_processor

        def _switch_to_input_mode(self):
            self.backend_tokenizer.post_processor = tiny_tokenizer("decoder_only").backend_tokenizer.post_processor

    backend = tiny_tokenizer("decoder_only").backend_tokenizer
    tokenizer = Marked(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    for argument, family in (("text_target", "encoder_decoder"), ("text", "decoder_only")):
        assert token_ids(tokenizer, TEXTS, argument) == tiny_tokenizer(family)(TEXTS)["input_ids"]
