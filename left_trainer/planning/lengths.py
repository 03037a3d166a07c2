"""How long the rows of a dataset are, without tokenizing all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from left_trainer.data.arguments import DataArguments
from left_trainer.data.dataset_types import is_lazy
from left_trainer.data.loading import load_task_data
from left_trainer.models import ModelFamily, ModelSource
from left_trainer.tasks import Task
from left_trainer.token_mean import IGNORE_INDEX

MOST_READ = 100_000  # rows
LONGEST_TRIED = 64  # rows with the most characters, of which the one with the most tokens is taken
SAMPLED = 256  # rows that stand for the mean


@dataclass(frozen=True)
class RowLengths:
    """Tokens of the rows of a dataset, as a run cuts them.

    Args:
        n_rows: Of the dataset.
        source: Of the longest source; in a decoder-only model, what of the longest row is no target.
        target: Of the longest target.
        mean_source: Of all sources.
        mean_target: Of all targets.
    """

    n_rows: int
    source: int
    target: int
    mean_source: float
    mean_target: float

    def cut(self, family: ModelFamily, source: int | None, target: int | None) -> RowLengths:
        """With rows of at most so many tokens: of source and target, or of a whole row in a decoder-only model."""
        if family == "encoder_decoder":
            return RowLengths(
                self.n_rows,
                _at_most(self.source, source),
                _at_most(self.target, target),
                _at_most(self.mean_source, source),
                _at_most(self.mean_target, target),
            )
        total = _at_most(self.source + self.target, source)
        mean = _at_most(self.mean_source + self.mean_target, source)
        most, mean_target = min(self.target, total), min(self.mean_target, mean)
        return RowLengths(self.n_rows, total - most, most, mean - mean_target, mean_target)


def row_lengths(
    dataset: Any, family: ModelFamily, tokenizer: PreTrainedTokenizerBase | None, text_field: str = "text"
) -> RowLengths | None:
    """The lengths of `dataset`; `None` where they cannot be told from its first rows, such as of a stream.

    Args:
        dataset: Rows of token ids, of `prompt` and `completion`, of chat `messages`, or of plain text.
        family: Of the model.
        tokenizer: Of the model; of rows of token ids none is needed.
        text_field: Column of plain text.
    """
    if not isinstance(dataset, Dataset) or is_lazy(dataset) or not len(dataset):
        return None
    n_rows, rows = len(dataset), dataset.with_format(None).select(range(min(len(dataset), MOST_READ)))
    if "input_ids" in rows.column_names:
        return _of_tokens(rows, family, n_rows)
    columns = [name for name in ("prompt", "completion") if name in rows.column_names]
    columns = columns or [name for name in ("messages", "conversations", text_field) if name in rows.column_names][:1]
    if not columns or tokenizer is None:
        return None
    return _of_text(rows.select_columns(columns), family, tokenizer, n_rows)


def task_lengths(
    task: Task, data: DataArguments, source: ModelSource, tokenizer: PreTrainedTokenizerBase
) -> RowLengths | None:
    """The lengths of a task's training rows with their prompts, before any cut.

    Raises:
        ValueError: As `load_task_data`.
        FileNotFoundError: A file that does not exist.
    """
    rows = load_task_data(task, data, token=source.options.get("token"))["train"]
    pairs = rows.select_columns(["source", "target"]).rename_columns({"source": "prompt", "target": "completion"})
    found = row_lengths(pairs, source.family, tokenizer)
    template = (data.prompt or task.prompt).format(source="")
    around = len(tokenizer(template, add_special_tokens=False)["input_ids"])
    return found and replace(found, source=found.source + around, mean_source=found.mean_source + around)


def _of_tokens(rows: Dataset, family: ModelFamily, n_rows: int) -> RowLengths:
    totals = [len(ids) for ids in rows["input_ids"]]
    targets = totals
    if "labels" in rows.column_names:
        targets = [len(labels) - labels.count(IGNORE_INDEX) for labels in rows["labels"]]
    if family == "decoder_only":
        return _joined([(total - target, target) for total, target in zip(totals, targets, strict=True)], n_rows)
    return _summed(list(zip(totals, targets, strict=True)), n_rows)


def _of_text(rows: Dataset, family: ModelFamily, tokenizer: PreTrainedTokenizerBase, n_rows: int) -> RowLengths:
    """Of the rows with the most characters all are tokenized, of the others some."""
    tried: set[int] = set()
    characters = [[_n_characters(text) for text in rows[name]] for name in rows.column_names]
    for sizes in [*characters, [sum(each) for each in zip(*characters, strict=True)]]:
        tried.update(sorted(range(len(sizes)), key=sizes.__getitem__)[-LONGEST_TRIED:])
    sampled = range(0, len(rows), max(1, len(rows) // SAMPLED))
    longest = _token_pairs(rows.select(sorted(tried)), family, tokenizer)
    mean = _token_pairs(rows.select(sampled), family, tokenizer)
    count = _summed if family == "encoder_decoder" else _joined
    found, typical = count([*longest, *mean], n_rows), count(mean, n_rows)
    return RowLengths(n_rows, found.source, found.target, typical.mean_source, typical.mean_target)


def _token_pairs(rows: Dataset, family: ModelFamily, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Tokens of source and target of each row; of text that is trained on whole, all are the target's."""

    def count(texts: Sequence[Any], **options: Any) -> list[int]:
        if texts and not isinstance(texts[0], str):
            rendered = [tokenizer.apply_chat_template(text, tokenize=False) for text in texts]
            return [len(ids) for ids in tokenizer(rendered, add_special_tokens=False)["input_ids"]]
        return [len(ids) for ids in tokenizer(list(texts), **options)["input_ids"]]

    if "completion" not in rows.column_names:
        return [(0, size + 1) for size in count(rows[rows.column_names[0]])]  # and the end of the sequence
    is_pair, completions = family == "encoder_decoder", rows["completion"]
    if is_pair:
        completions = [text.strip() for text in completions]
    targets = [size + (not is_pair) for size in count(completions, add_special_tokens=is_pair)]
    return list(zip(count(rows["prompt"]), targets, strict=True))


def _summed(pairs: list[tuple[int, int]], n_rows: int) -> RowLengths:
    sources, targets = zip(*pairs, strict=True)
    return RowLengths(n_rows, max(sources), max(targets), sum(sources) / len(sources), sum(targets) / len(targets))


def _joined(pairs: list[tuple[int, int]], n_rows: int) -> RowLengths:
    """Of rows in which source and target follow each other, so that the longest row counts."""
    apart = _summed(pairs, n_rows)
    total = max(source + target for source, target in pairs)
    return RowLengths(n_rows, total - apart.target, apart.target, apart.mean_source, apart.mean_target)


def _n_characters(text: Any) -> int:
    return len(text) if isinstance(text, str) else len(str(text))


def _at_most(number: Any, limit: int | None) -> Any:
    return number if limit is None else min(number, limit)
