"""Evaluation rows of decoder-only models, as TRL tokenizes them, but for those that it leaves out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from left_trainer.data.features import AnyDataset, are_prompts, cut_rows, have_no_labels, tokenize_prompts
from left_trainer.training_args import LeftTrainingArguments


def evaluation_rows(
    rows: AnyDataset,
    prepare: Callable[[LeftTrainingArguments, bool], AnyDataset],
    tokenizer: PreTrainedTokenizerBase,
    args: LeftTrainingArguments,
    packing: bool,
    positions: int | None,
    template: Mapping[str, Any],
) -> AnyDataset:
    """Features of every row, in their order; packed rows are joined, so that there are fewer of them.

    Args:
        rows: As the user gave them.
        prepare: TRL's preparation of `rows`, by arguments and with or without packing.
        tokenizer: Of the model.
        args: Of the run.
        packing: Whether rows are joined.
        positions: That the model has for text; `None` where it sets no limit.
        template: For the tokenizer's chat template.
    """
    args = args.replaced(shuffle_dataset=False)
    if packing:
        return prepare(args, True)
    limit = min((bound for bound in (args.max_length, positions) if bound), default=None)
    if are_prompts(rows) or (args.predict_with_generate and have_no_labels(rows)):
        features = tokenize_prompts(rows, tokenizer, **template)
    else:
        features = prepare(args.replaced(max_length=None), False)
    return cut_rows(features, limit, args.truncation_mode)
