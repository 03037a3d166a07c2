"""From the columns of any data to the two texts that a task needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.compute
from datasets import ClassLabel, Dataset, IterableDataset, Value

from left_trainer.data.dataset_types import AnyDataset
from left_trainer.registry import did_you_mean

ROLES = ("source", "target")
ARROW_ROWS = 10_000


def text_columns(rows: AnyDataset, columns: Mapping[str, str], split: str) -> AnyDataset:
    """Rows with nothing but the text columns `source` and `target`.

    Args:
        rows: Rows with columns of any kind, none left out of what the user named.
        columns: For `source` and `target`, the column to take it from; a dot goes into a nested one, `translation.en`.
            Integers of a `ClassLabel` become the names of their classes, lists of turns become lines.
        split: What the rows are, for errors.

    Raises:
        ValueError: A missing column, or a row whose source or target is no text or empty.
    """
    if isinstance(rows, IterableDataset):
        return _streamed_columns(rows, columns, split)
    rows = rows.flatten()
    for role in ROLES:
        if columns[role] not in rows.column_names:
            raise missing_column(columns[role], role, rows.column_names, f"The {split} rows have")
    kinds = {role: rows.features[columns[role]] for role in ROLES}
    is_text = all(map(holds_text, kinds.values()))
    if is_text and columns["source"] != columns["target"]:
        rows = rows.select_columns(list(columns.values()))
        for role, column in columns.items():
            number = first_blank(rows, column)
            if number is not None:
                as_text(rows[number][column], role, f"Row {number} of the {split} rows")
        return rows.rename_columns({columns[role]: role for role in ROLES})

    def texts(batch: Mapping[str, list[Any]], numbers: list[int]) -> dict[str, list[str]]:
        return {
            role: [
                as_text(_class_name(value, kinds[role]), role, f"Row {number} of the {split} rows")
                for value, number in zip(batch[columns[role]], numbers, strict=True)
            ]
            for role in ROLES
        }

    return rows.map(texts, batched=True, with_indices=True, remove_columns=rows.column_names, desc="Columns")


def _streamed_columns(rows: IterableDataset, columns: Mapping[str, str], split: str) -> IterableDataset:
    kinds = dict(rows.features or {})

    def texts(row: Mapping[str, Any], number: int) -> dict[str, str]:
        named = {name: _class_name(value, kinds.get(name)) for name, value in row.items()}
        source, target = record_texts(named, columns, f"Row {number} of the {split} rows")
        return {"source": source, "target": target}

    return rows.map(texts, with_indices=True, remove_columns=list(next(iter(rows), {})))


def record_texts(row: Mapping[str, Any], columns: Mapping[str, str], named: str) -> tuple[str, str]:
    """Source and target of one row of a file; `named` is the row, and all else as in `text_columns`."""
    source, target = (as_text(_value(row, columns[role], role, named), role, named) for role in ROLES)
    return source, target


def as_text(value: Any, role: str, named: str) -> str:
    """`value` where it is text, and the lines of a list of turns."""
    text = "\n".join(value) if isinstance(value, list) and all(isinstance(turn, str) for turn in value) else value
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"{named} has {_shortened(value)} as its {role}. Expected a text that is not empty, a list of turns or a "
            "datasets.ClassLabel. Remove such rows, or convert the values to text."
        )
    return text


def missing_column(column: str, role: str, present: Sequence[str], who_has: str) -> ValueError:
    """What to raise where rows lack the column."""
    return ValueError(
        f"{who_has} no column {column!r} for the {role}.{did_you_mean(column, present)} Present: "
        f"{', '.join(present)}. Name it with --{role}_column."
    )


def _value(row: Mapping[str, Any], column: str, role: str, named: str) -> Any:
    """The value of a column, which may be nested."""
    flat = _flattened(row)
    if column not in flat:
        raise missing_column(column, role, list(flat), f"{named} has")
    return flat[column]


def _flattened(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        flat |= _flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _class_name(value: Any, kind: Any) -> Any:
    # -1 stands for a label that was not given.
    return kind.names[value] if isinstance(kind, ClassLabel) and value in range(len(kind.names)) else value


def holds_text(kind: Any) -> bool:
    """Whether a feature is plain text."""
    return isinstance(kind, Value) and kind.dtype in ("string", "large_string")


def first_blank(rows: Dataset, column: str) -> int | None:
    """Number of the first row without text in a column of texts, from Arrow: no row becomes a Python object."""
    start = 0
    for table in rows.select_columns([column]).with_format("arrow").iter(batch_size=ARROW_ROWS):
        lengths = pyarrow.compute.binary_length(pyarrow.compute.utf8_trim_whitespace(table[column]))
        number = pyarrow.compute.index(pyarrow.compute.fill_null(lengths, 0), 0).as_py()
        if number >= 0:
            return start + number
        start += table.num_rows
    return None


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
