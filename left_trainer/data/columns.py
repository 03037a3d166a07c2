"""From the columns of any data set to the two texts that a task needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import ClassLabel, Dataset

from left_trainer.registry import did_you_mean

ROLES = ("source", "target")


def text_columns(rows: Dataset, columns: Mapping[str, str], split: str) -> Dataset:
    """Rows with nothing but the text columns `source` and `target`.

    Args:
        rows: Rows with columns of any kind.
        columns: For `source` and `target`, the column to take it from; a dot goes into a nested one, `translation.en`.
            Integers of a `ClassLabel` become the names of their classes, lists of turns become lines.
        split: What the rows are, for errors.

    Raises:
        ValueError: A missing column, or a row whose source or target is no text or empty.
    """
    rows = rows.flatten()
    for role in ROLES:
        column = columns[role]
        if column not in rows.column_names:
            hint = did_you_mean(column, rows.column_names)
            raise ValueError(
                f"The {split} rows have no column {column!r} for the {role}.{hint} "
                f"Present: {', '.join(rows.column_names)}. Name it with --{role}_column."
            )

    def texts(row: dict[str, Any], index: int) -> dict[str, str]:
        return {role: _text(row[columns[role]], rows.features[columns[role]], role, split, index) for role in ROLES}

    return rows.map(texts, with_indices=True, remove_columns=rows.column_names, desc="Columns")


def _text(value: Any, feature: Any, role: str, split: str, index: int) -> str:
    text = value
    if isinstance(feature, ClassLabel) and value in range(len(feature.names)):  # -1 stands for a label not given
        text = feature.names[value]
    elif isinstance(value, list) and all(isinstance(turn, str) for turn in value):
        text = "\n".join(value)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"Row {index} of the {split} rows has {value!r} as its {role}. Expected a text that is not empty, a list "
            "of turns or a datasets.ClassLabel. Remove such rows, or convert the values to text."
        )
    return text
