"""New columns of a data set, made in batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow
from datasets import Features, IterableDataset

from left_trainer.data.dataset_types import AnyDataset
from left_trainer.data.processes import first_process_of_machine_first

Columns = Mapping[str, list[Any]]


def add_columns(
    dataset: AnyDataset,
    function: Callable[[Columns], dict[str, list[Any]]],
    reads: Sequence[str],
    makes: Features,
    removes: Sequence[str] = (),
    desc: str | None = None,
    num_proc: int | None = None,
) -> AnyDataset:
    """`dataset` with the columns that `function` makes of others, batch by batch.

    As `Dataset.map`, but what is made goes to Arrow as it is, where `map` would look at each token. The result is
    stored and found again likewise.

    Args:
        dataset: Stored or streamed rows of plain Python objects.
        function: From the columns of a batch to new ones.
        reads: Columns that it is given.
        makes: Columns that it returns, with their types.
        removes: Columns that are left out of the result.
        desc: What the progress bar says.
        num_proc: Number of processes.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.map(function, batched=True, remove_columns=list(removes))
    kept = {name: kind for name, kind in dataset.features.items() if name not in {*removes, *makes}}
    schema = makes.arrow_schema

    def batch(table: pyarrow.Table) -> pyarrow.Table:
        made = function({name: table[name].to_pylist() for name in reads})
        arrays = [pyarrow.array(made[name], schema.field(name).type) for name in schema.names]
        columns = [table[name] for name in kept] + arrays
        return pyarrow.table(columns, names=[*kept, *schema.names])

    with first_process_of_machine_first(dataset):
        mapped = dataset.with_format("arrow").map(
            batch, batched=True, features=Features({**kept, **makes}), desc=desc, num_proc=num_proc
        )
    return mapped.with_format(None)
