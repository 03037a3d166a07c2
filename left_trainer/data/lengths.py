"""Rows that are too long: cut, and counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset
from numpy.typing import NDArray

from left_trainer.data.cut_rows import CutRows
from left_trainer.data.dataset_types import AnyDataset
from left_trainer.token_mean import IGNORE_INDEX

ARROW_ROWS = 10_000
# Columns of a row that say whether its texts were cut.
SOURCE_CUT, TARGET_CUT = CUTS = "source_was_cut", "target_was_cut"
SLICES = {"keep_start": lambda limit: slice(None, limit), "keep_end": lambda limit: slice(-limit, None)}


def count_cut_rows(rows: Dataset, n_rows: int | None = None) -> CutRows:
    """The counts of what the columns `CUTS` say; rows without them were not cut.

    Args:
        rows: After the cut.
        n_rows: Before some were dropped.
    """
    sources, targets = (_number_of_true(rows, name) if name in rows.column_names else 0 for name in CUTS)
    total = len(rows) if n_rows is None else n_rows
    return CutRows(total, sources, targets, total - len(rows))


def cut_sequences(dataset: AnyDataset, limit: int | None, mode: str, keeps_prompts: bool = False) -> AnyDataset:
    """Rows of a decoder-only model with at most `limit` tokens, and in `CUTS` what of them was cut.

    Args:
        dataset: With `input_ids` and `labels`, which have -100 at the prompt. Columns of `CUTS` are added to.
        limit: Number of tokens; `None` cuts nothing.
        mode: TRL's `truncation_mode`.
        keeps_prompts: Whether a row that would be left without prompt or target keeps the end of its prompt, which can
            be continued but has no loss.
    """
    if limit is None or (isinstance(dataset, Dataset) and row_lengths(dataset, ["labels"]).max(initial=0) <= limit):
        return dataset

    def cut_batch(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        columns = [name for name in ("input_ids", "labels", *CUTS) if name in batch]
        rows = [cut(dict(zip(columns, row, strict=True))) for row in zip(*map(batch.get, columns), strict=True)]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def cut(row: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: list(row[name])[SLICES[mode](limit)] for name in ("input_ids", "labels")}
        before, after = (_number_of_targets(labels) for labels in (row["labels"], kept["labels"]))
        has_both = after and kept["labels"][0] == IGNORE_INDEX
        prompt = _prompt(row)[-limit:]
        if keeps_prompts and len(row["labels"]) > limit and prompt and not has_both:
            kept, after = {"input_ids": prompt, "labels": [IGNORE_INDEX] * len(prompt)}, 0
        source_cut = len(row["labels"]) - before > len(kept["labels"]) - after
        return {
            **kept,
            SOURCE_CUT: bool(row.get(SOURCE_CUT)) or source_cut,
            TARGET_CUT: bool(row.get(TARGET_CUT)) or before > after,
        }

    return dataset.map(cut_batch, batched=True, **({"desc": "Truncating"} if isinstance(dataset, Dataset) else {}))


def row_lengths(dataset: Dataset, columns: Sequence[str]) -> NDArray[np.int64]:
    """Number of tokens of each row in each column, `(rows, columns)`, from Arrow's offsets: no token is read."""
    parts = [
        np.stack([table[column].combine_chunks().value_lengths().to_numpy() for column in columns], axis=1)
        for table in _tables(dataset, columns)
    ]
    return np.concatenate([np.zeros((0, len(columns))), *parts]).astype(np.int64)


def target_counts(dataset: Dataset) -> NDArray[np.int64]:
    """Number of tokens of each row that its loss is taken over, `(rows,)`."""
    parts = []
    for table in _tables(dataset, ["labels"]):
        labels = table["labels"].combine_chunks()
        before = np.concatenate(([0], np.cumsum(labels.flatten().to_numpy(zero_copy_only=False) != IGNORE_INDEX)))
        ends = np.cumsum(labels.value_lengths().to_numpy())
        parts.append(np.diff(before[ends], prepend=0))
    return np.concatenate([np.zeros(0), *parts]).astype(np.int64)


def with_targets(dataset: AnyDataset) -> AnyDataset:
    """The rows that have something to learn."""
    if not isinstance(dataset, Dataset):
        return dataset.filter(has_target)
    counts = target_counts(dataset)
    return dataset if counts.all() else dataset.select(np.flatnonzero(counts))


def _tables(dataset: Dataset, columns: Sequence[str]) -> Iterator[pyarrow.Table]:
    return dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=ARROW_ROWS)


def _number_of_true(rows: Dataset, column: str) -> int:
    return sum(pyarrow.compute.sum(table[column]).as_py() or 0 for table in _tables(rows, [column]))


def has_target(row: Mapping[str, Any]) -> bool:
    """Whether a row has something to learn."""
    return _number_of_targets(row["labels"]) > 0


def _prompt(row: Mapping[str, Any]) -> list[int]:
    """The tokens before the first that has a label."""
    end = next((place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX), None)
    return list(row["input_ids"][:end])


def _number_of_targets(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORE_INDEX)
