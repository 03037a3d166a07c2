"""Training, validation and test rows of whatever splits there are."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from datasets import Dataset, DatasetDict, IterableDataset

from left_trainer.data.dataset_types import AnyDataset

HELD_OUT_FRACTION = 0.05
HELD_OUT_OF_STREAM = 200  # the first rows; how many a stream has is not known
SPLIT_SEED = 0

Limits = Mapping[str, int | None]


def stored_splits(rows: Mapping[str, Dataset], limits: Limits, name: str) -> DatasetDict:
    """The splits `train`, `validation` and `test`, the latter two taken from the others where they are missing.

    Args:
        rows: By split.
        limits: Most rows of each split.
        name: Of the data, for errors.

    Raises:
        ValueError: There are no training rows, or too few to hold some out.
    """
    train, splits = _training_rows(rows, name), dict(rows)
    if "validation" not in rows:
        if len(train) < 2:
            raise ValueError(_too_few(name))
        n_held_out = max(1, int(len(train) * HELD_OUT_FRACTION))
        held_out = train.train_test_split(test_size=n_held_out, seed=SPLIT_SEED)
        splits |= {"train": held_out["train"], "validation": held_out["test"]}
    splits.setdefault("test", splits["validation"])
    return DatasetDict({split: first_rows(splits[split], limit, split) for split, limit in limits.items()})


def streamed_splits(rows: Mapping[str, AnyDataset], limits: Limits, name: str) -> dict[str, AnyDataset]:
    """As `stored_splits`; the training rows are streamed, the others are read.

    Without validation rows the first 200 training rows are held out, or 5 percent where there are no more.
    """
    train = _training_rows(rows, name)
    if isinstance(train, Dataset):
        train = train.to_iterable_dataset()
    splits = {split: _stored(part, limits[split]) for split, part in rows.items() if split != "train"}
    if "validation" not in rows:
        start = list(train.take(HELD_OUT_OF_STREAM + 1))
        if len(start) < 2:
            raise ValueError(_too_few(name))
        n_held_out = min(HELD_OUT_OF_STREAM, len(start) - 1)
        if len(start) <= HELD_OUT_OF_STREAM:
            n_held_out = max(1, int(len(start) * HELD_OUT_FRACTION))
        splits["validation"], train = Dataset.from_list(start[:n_held_out]), train.skip(n_held_out)
    splits.setdefault("test", splits["validation"])
    splits = {split: first_rows(part, limits[split], split) for split, part in splits.items()}
    limit = limits["train"]
    return {"train": train.take(limit) if limit else train, **splits}


def first_rows(rows: Dataset, limit: int | None, split: str) -> Dataset:
    """The first `limit` rows, or all."""
    if len(rows) == 0:
        raise ValueError(f"The {split} rows are empty. Pass data with at least one row.")
    return rows.select(range(min(len(rows), limit or len(rows))))


def _training_rows(rows: Mapping[str, AnyDataset], name: str) -> AnyDataset:
    if "train" not in rows:
        raise ValueError(f"{name} has the splits {', '.join(map(str, rows))} and no 'train'. Pass files instead.")
    return rows["train"]


def _too_few(name: str) -> str:
    return f"{name} has one training row and no validation rows. Pass --validation_file."


def _stored(rows: AnyDataset, limit: int | None) -> Dataset:
    return Dataset.from_list(list(islice(rows, limit))) if isinstance(rows, IterableDataset) else rows
