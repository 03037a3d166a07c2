"""Prompts and completions of decoder-only batches, for evaluation by generation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.utils.rnn import pad_sequence

from left_trainer.loss import IGNORE_INDEX


def split_prompts(inputs: Mapping[str, torch.Tensor], pad_token_id: int) -> dict[str, torch.Tensor]:
    """The prompts of a right-padded training batch, left-padded so that generation continues all of them.

    A prompt ends where the labels begin: everything before the first label that is not -100.

    Args:
        inputs: `input_ids`, `labels` and optionally `attention_mask`, each `(batch, sequence)`.
        pad_token_id: Fills the left side.

    Returns:
        `input_ids` and `attention_mask`, each `(batch, longest prompt)`.

    Raises:
        ValueError: A row whose labels cover the whole sequence, so that there is no prompt to continue.
    """
    ids, labels = inputs["input_ids"], inputs["labels"]
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    lengths = labels.ne(IGNORE_INDEX).int().argmax(dim=1)
    if bool((lengths == 0).any()):
        raise ValueError(
            "predict_with_generate=True needs to know where each prompt ends, and a row of the evaluation data has no "
            "prompt: its labels cover the whole text. Pass prompt/completion rows, or set predict_with_generate=False."
        )
    prompts = [row[:length][keep[:length]] for row, keep, length in zip(ids, mask, lengths.tolist(), strict=True)]
    masks = [torch.ones_like(prompt) for prompt in prompts]
    return {
        "input_ids": pad_sequence(prompts, batch_first=True, padding_value=pad_token_id, padding_side="left"),
        "attention_mask": pad_sequence(masks, batch_first=True, padding_value=0, padding_side="left"),
    }


def generation_arguments(
    max_new_tokens: int | None, num_beams: int | None, given: Mapping[str, object]
) -> dict[str, object]:
    """Arguments for `generate`: those given for this call, else those of the training arguments."""
    arguments = {key: value for key, value in given.items() if value is not None}
    if "max_length" not in arguments and "max_new_tokens" not in arguments and max_new_tokens is not None:
        arguments["max_new_tokens"] = max_new_tokens
    if "num_beams" not in arguments and num_beams is not None:
        arguments["num_beams"] = num_beams
    return arguments
