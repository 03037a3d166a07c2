"""Texts to tokens and labels for decoder-only models: what TRL makes of them row by row, in batches and in one pass."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from left_trainer.data.dataset_types import AnyDataset
from left_trainer.data.encoding import token_ids
from left_trainer.data.mapping import Columns, add_columns
from left_trainer.token_mean import IGNORE_INDEX

# In the types that TRL gives them.
TOKENS = Features({"input_ids": List(Value("int32")), "labels": List(Value("int64"))})

logger = logging.getLogger(__name__)


def tokenize_texts(
    dataset: AnyDataset,
    form: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    completion_only_loss: bool,
    num_proc: int | None = None,
) -> AnyDataset:
    """Rows with `input_ids` and `labels` beside their columns; the last text of a row ends with the end of sequence.

    Args:
        dataset: Rows of plain text.
        form: Their columns: `prompt` and `completion`, or the one with the whole text.
        tokenizer: Of the model. It appends no end of sequence by itself.
        completion_only_loss: Whether prompts have the label -100.
        num_proc: Number of processes. By default one, in which a fast tokenizer uses a thread a core.
    """
    end = tokenizer.eos_token

    def tokenize(batch: Columns) -> dict[str, list[Any]]:
        texts = [text if text.endswith(end) else text + end for text in batch[form[-1]]]
        if len(form) == 1:
            ids = token_ids(tokenizer, texts)
            return {"input_ids": ids, "labels": ids}
        ids = token_ids(tokenizer, [prompt + text for prompt, text in zip(batch[form[0]], texts, strict=True)])
        if not completion_only_loss:
            return {"input_ids": ids, "labels": ids}
        prompts = token_ids(tokenizer, batch[form[0]])
        return {"input_ids": ids, "labels": [_labels(*pair) for pair in zip(prompts, ids, strict=True)]}

    return add_columns(dataset, tokenize, form, TOKENS, desc="Tokenizing", num_proc=num_proc)


def are_plain_texts(dataset: AnyDataset, form: Sequence[str]) -> bool:
    """Whether the columns of `form` hold text, and not chat messages."""
    first = next(iter(dataset))
    return all(isinstance(first[column], str) for column in form)


def _labels(prompt: list[int], ids: list[int]) -> list[int]:
    n_prompt = len(prompt)
    if ids[:n_prompt] != prompt:
        differing = (number for number, pair in enumerate(zip(prompt, ids, strict=False)) if pair[0] != pair[1])
        n_prompt = next(differing, min(n_prompt, len(ids)))
        _warn_of_merge()
    return [IGNORE_INDEX] * n_prompt + ids[n_prompt:]


@functools.cache  # said once
def _warn_of_merge() -> None:
    logger.warning(
        "The tokens of a prompt are not those that its prompt and completion together begin with: its end merges with "
        "the completion, and is learnt with it. Let the prompt end where a token ends, for example without a space."
    )
