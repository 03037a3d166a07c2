"""From the rows that a trainer is given to its features, with what was cut of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from left_trainer.data.cut_rows import CutRows, describe_cuts
from left_trainer.data.dataset_types import AnyDataset, as_dataset, is_lazy
from left_trainer.data.features import (
    are_prompts,
    columns_of_other_forms,
    dataset_form,
    have_no_labels,
    tokenize_pairs,
    tokenize_prompts,
)
from left_trainer.data.lengths import CUTS, count_cut_rows, cut_sequences, with_targets
from left_trainer.data.texts import are_plain_texts, tokenize_texts
from left_trainer.models import ModelFamily
from left_trainer.models.positions import Limits
from left_trainer.trainer.checks import check_fits
from left_trainer.training_args import LeftTrainingArguments

logger = logging.getLogger(__name__)


class FeaturesHost(Protocol):
    """What the preparation of rows needs of a trainer."""

    args: LeftTrainingArguments
    family: ModelFamily
    free_positions: Limits
    cut_rows: dict[str, CutRows]
    chat_template: str | None
    completion_only_loss: bool


def given_datasets(train: Any, evaluation: Any) -> tuple[AnyDataset | None, Any]:
    """What a user passes as training and evaluation rows, as datasets; for the latter also a dict of them."""
    train = None if train is None else as_dataset(train, "train_dataset")
    return train, evaluation_datasets(evaluation, "eval_dataset")


def evaluation_datasets(evaluation: Any, argument: str) -> Any:
    """Rows to evaluate on as a dataset, or a dict of them. The name of one is left as it is."""
    if isinstance(evaluation, Mapping):
        return {name: as_dataset(part, f"{argument}[{name!r}]") for name, part in evaluation.items()}
    return evaluation if isinstance(evaluation, str | None) else as_dataset(evaluation, argument)


def seq2seq_features(
    host: FeaturesHost, dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase, args: LeftTrainingArguments, split: str
) -> AnyDataset:
    """Rows of an encoder-decoder model with `input_ids`, `attention_mask` and `labels`; tokens stay as they are."""
    if "input_ids" in next(iter(dataset), {}):
        check_fits(dataset, host.free_positions, f"the {split} dataset")
        return dataset
    if not are_prompts(dataset):
        dataset_form(dataset, "encoder_decoder", f"the {split} dataset")
    limits = host.free_positions.at_most(args.max_length)
    features = tokenize_pairs(dataset, tokenizer, limits, args.truncation_mode, args.dataset_num_proc)
    if isinstance(features, Dataset):
        host.cut_rows[split] = count_cut_rows(features)
    return features.remove_columns([name for name in CUTS if name in next(iter(features), {})])


def sft_features(
    host: FeaturesHost,
    tokenize: Callable[..., AnyDataset],
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    args: LeftTrainingArguments,
    packing: bool,
    formatting_func: Callable[[dict[str, Any]], str] | None,
    split: str,
) -> AnyDataset:
    """Rows of a decoder-only model with `input_ids` and `labels`, cut and counted, then packed if asked for.

    Args:
        host: The trainer.
        tokenize: TRL's `_prepare_dataset`.
        dataset: Text or tokens.
        tokenizer: Of the model.
        args: Of the trainer.
        packing: Whether rows are joined.
        formatting_func: As in `SFTTrainer`.
        split: Name of the rows, for the counts.

    Raises:
        ValueError: No row keeps a target.
    """
    if is_lazy(dataset):
        return dataset
    trains, limit = split == "train", host.free_positions.at_most(args.max_length).source
    is_text = "input_ids" not in next(iter(dataset), {})
    # TRL cuts without counting, leaves rows out, and shuffles what is evaluated too, so that this is not left to it.
    whole = _sft_tokens(host, tokenize, dataset, tokenizer, args, formatting_func, split)
    kept = cut_sequences(whole, None if packing else limit, args.truncation_mode, keeps_prompts=not trains)
    if trains:
        kept = with_targets(kept)
    if isinstance(kept, Dataset):
        counted = count_cut_rows(kept, len(whole))
        if trains:
            _check_targets_left(counted, limit)
        if is_text or counted:  # else they may be features that were counted when they were made
            host.cut_rows[split] = counted
    kept = kept.remove_columns([name for name in CUTS if name in next(iter(kept), {})])
    shuffles = args.shuffle_dataset and trains
    if not packing and not shuffles:
        return kept
    return tokenize(kept, tokenizer, args.replaced(max_length=limit, shuffle_dataset=shuffles), packing, None, split)


def _sft_tokens(
    host: FeaturesHost,
    tokenize: Callable[..., AnyDataset],
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    args: LeftTrainingArguments,
    formatting_func: Callable[[dict[str, Any]], str] | None,
    split: str,
) -> AnyDataset:
    """Rows of a decoder-only model with `input_ids` and `labels`, of any length; arguments as in `sft_features`."""
    columns, field = list(next(iter(dataset), {})), args.dataset_text_field
    form: tuple[str, ...] | None = None
    has_prompts = are_prompts(dataset) or (args.predict_with_generate and have_no_labels(dataset))
    if has_prompts and split != "train" and formatting_func is None:
        return tokenize_prompts(dataset, tokenizer, chat_template=host.chat_template)
    if "input_ids" not in columns and formatting_func is not None:
        dataset, form = dataset.map(lambda row: {field: formatting_func(row)}, remove_columns=columns), (field,)
    elif "input_ids" not in columns:
        form = dataset_form(dataset, "decoder_only", f"the {split} dataset", field)
        dataset = dataset.remove_columns(columns_of_other_forms(columns, form, field))
    if form is not None and are_plain_texts(dataset, form) and not args.assistant_only_loss:
        return tokenize_texts(dataset, form, tokenizer, host.completion_only_loss, args.dataset_num_proc)
    return tokenize(dataset, tokenizer, args.replaced(max_length=None, shuffle_dataset=False), False, None, split)


def tell_cuts(host: FeaturesHost, split: str | None = None) -> None:
    """Say, in one sentence, what was cut of all splits, or of one."""
    counts = {name: count for name, count in host.cut_rows.items() if split in (None, name)}
    sentence = describe_cuts(counts)
    if sentence and host.args.process_index == 0:
        logger.warning(sentence)


def _check_targets_left(counted: CutRows, limit: int | None) -> None:
    if counted.rows and counted.dropped == counted.rows:
        raise ValueError(
            f"None of the {counted.rows} rows of train_dataset keeps a target: their prompts fill the limit of {limit} "
            "tokens. Raise max_length, or set truncation_mode='keep_end', which cuts the start of the prompts."
        )
