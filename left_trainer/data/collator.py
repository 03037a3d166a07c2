"""Batches of encoder-decoder models: padded on the right, whatever the tokenizer says."""

from __future__ import annotations

import copy
from typing import Any

from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase


def seq2seq_collator(tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None) -> DataCollatorForSeq2Seq:
    """Pads sources with the tokenizer's token and labels with -100."""
    return DataCollatorForSeq2Seq(padding_on_the_right(tokenizer), pad_to_multiple_of=pad_to_multiple_of)


def corrected_collator(collator: Any) -> Any:
    """Hugging Face's collator as `seq2seq_collator` makes it; any other as it is. The object itself is not changed.

    It pads labels on the side of the sources, and a decoder reads the padding on the left. With `model` it makes
    `decoder_input_ids`, and FSMT then writes padding into the labels, which is trained on (transformers 5.23). The
    inputs of the decoder are made in `left_trainer.models.decoder_inputs`.
    """
    if not isinstance(collator, DataCollatorForSeq2Seq):
        return collator
    corrected = copy.copy(collator)
    corrected.tokenizer = padding_on_the_right(collator.tokenizer)
    if type(collator) is DataCollatorForSeq2Seq:
        corrected.model = None
    return corrected


def padding_on_the_right(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """`tokenizer`, or a copy that pads on the right."""
    if tokenizer.padding_side == "right":
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.padding_side = "right"
    return tokenizer
