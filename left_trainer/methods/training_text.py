"""Text of the training data, for methods that start from it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from left_trainer.methods.method import Batches
from left_trainer.models.decoder_inputs import decoder_input_ids
from left_trainer.token_mean import IGNORE_INDEX

ROWS = 64


def first_rows(batches: Batches) -> list[dict[str, torch.Tensor]]:
    """The first `ROWS` training rows without their padding, the longest first, however they are cut into batches.

    Each has `input_ids` and `labels`, `(length,)`.
    """
    rows: list[dict[str, torch.Tensor]] = []
    for batch in batches(ROWS):
        ids, labels = batch["input_ids"], batch["labels"]
        masks = batch.get("attention_mask", torch.ones_like(ids)).bool()
        for row, mask, label in zip(ids, masks, labels, strict=True):
            rows.append({"input_ids": row[mask], "labels": label[label.ne(IGNORE_INDEX)]})
        if len(rows) >= ROWS:
            break
    return sorted(rows[:ROWS], key=lambda row: (-len(row["input_ids"]), row["input_ids"].tolist()))


def text_inputs(model: PreTrainedModel, batches: Batches, length: int) -> dict[str, torch.Tensor]:
    """One row of training text for `model`, with `length` tokens where prefixes are: in the decoder, or all there is.

    Shorter rows are joined, from the longest to the shortest; the sources of an encoder-decoder model are, too.

    Args:
        model: Without an adapter.
        batches: Of the training data.
        length: In tokens.
    """
    rows = first_rows(batches)
    inputs = {"input_ids": _joined([row["input_ids"] for row in rows], length)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = decoder_input_ids(model, _joined([row["labels"] for row in rows], length))
    return inputs


def _joined(parts: list[torch.Tensor], length: int) -> torch.Tensor:
    """The first `length` tokens of `parts` one after the other, again and again if need be, `(1, length)`."""
    text = torch.cat(parts)
    return text.repeat(-(-length // max(len(text), 1)))[None, :length]
