"""What a user may pass as a dataset, as one of the two classes of `datasets`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from datasets import Dataset, IterableDataset

AnyDataset: TypeAlias = Dataset | IterableDataset
Transform: TypeAlias = Callable[[dict[str, list[Any]]], dict[str, list[Any]]]
ROW_NUMBER = "row_number"


def as_dataset(dataset: Any, argument: str) -> AnyDataset:
    """`dataset` as a `Dataset` or `IterableDataset` whose values are plain Python objects.

    Args:
        dataset: A dataset of `datasets` in any format; a list of rows; a dataset of torch, whose rows are read when
            they are needed.
        argument: The user's argument that holds it, for errors.

    Raises:
        ValueError: Several datasets where one is expected, or rows that form no table.
        TypeError: Something that is no dataset, or whose rows are no dicts.
    """
    if isinstance(dataset, Dataset | IterableDataset):
        return without_format(dataset)
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"{argument} is a {type(dataset).__name__} with the keys {', '.join(map(repr, dataset))}. Pass one of its "
            f"datasets, {argument}=data[{next(iter(dataset), 'train')!r}]."
        )
    if isinstance(dataset, list | tuple):
        return _from_rows(dataset, argument)
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return IterableDataset.from_generator(_generator(dataset, argument))
    if all(hasattr(type(dataset), name) for name in ("__getitem__", "__len__")):
        return _read_when_needed(dataset, argument)
    raise TypeError(
        f"{argument} is a {type(dataset).__name__}. Pass a datasets.Dataset, a list of dicts or a torch Dataset."
    )


def is_lazy(dataset: Any) -> bool:
    """Whether the rows of `dataset` are computed when they are read, so that nothing is known of them before."""
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def without_format(dataset: AnyDataset) -> AnyDataset:
    """`dataset` with Python objects in place of tensors or arrays; one with a transform as it is."""
    if isinstance(dataset, IterableDataset):
        return dataset.with_format(None)
    if dataset.format["type"] in (None, "custom"):
        return dataset
    return dataset.select_columns(dataset.format["columns"]).with_format(None)


def only_columns(dataset: Dataset, columns: Sequence[str]) -> Dataset:
    """A lazy dataset of which some columns are read. The columns that its transform starts from all stay."""
    transform: Transform = dataset.format["format_kwargs"]["transform"]

    def read(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {name: values for name, values in transform(batch).items() if name in columns}

    return dataset.with_transform(read)


def _from_rows(rows: Sequence[Any], argument: str) -> Dataset:
    plain = [_plain_row(row, argument) for row in rows]
    try:
        return Dataset.from_list(plain)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{argument} is a list whose rows form no table: {error}. Give every row the same columns, and a column "
            "values of one type."
        ) from error


def _read_when_needed(dataset: Any, argument: str) -> Dataset:
    def read(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        rows = [_plain_row(dataset[number], argument) for number in batch[ROW_NUMBER]]
        return {name: [row[name] for row in rows] for name in rows[0]}

    return Dataset.from_dict({ROW_NUMBER: range(len(dataset))}).with_transform(read)


def _generator(dataset: Any, argument: str) -> Callable[[], Iterator[dict[str, Any]]]:
    def rows() -> Iterator[dict[str, Any]]:
        for row in dataset:
            yield _plain_row(row, argument)

    return rows


def _plain_row(row: Any, argument: str) -> dict[str, Any]:
    if not isinstance(row, Mapping) and not hasattr(row, "items"):  # BatchEncoding has items and is no Mapping
        raise TypeError(f"A row of {argument} is a {type(row).__name__}. Rows must be dicts of columns.")
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor | np.ndarray | np.generic) else value
