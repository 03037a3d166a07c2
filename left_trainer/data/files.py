"""Rows of files as data sets: stored in Arrow and found again by the next run, or streamed."""

from __future__ import annotations

import hashlib
import itertools
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import pyarrow
from datasets import Dataset, Features, IterableDataset, Value
from datasets.utils import tqdm

from left_trainer.data.columns import ROLES, record_texts
from left_trainer.data.paths import find_files, named
from left_trainer.data.processes import first_process_of_machine_first
from left_trainer.data.records import FILE_SUFFIXES, place, records

FEATURES = Features(dict.fromkeys(ROLES, Value("string")))
BATCH_ROWS = 10_000
LAYOUT = 1  # of what is stored; a change makes older files unused


def read_file(
    argument: str, name: str, columns: Mapping[str, str], encoding: str | None = None, overwrite_cache: bool = False
) -> Dataset:
    """The rows of a file, or of the files that match a pattern, with the text columns `source` and `target`.

    They are stored beside the cache of `datasets`, under a name that changes with the file.

    Args:
        argument: That names the file, for errors.
        name: Path of a JSONL, JSON, CSV, TSV or Parquet file, perhaps compressed.
        columns: As in `text_columns`.
        encoding: Of text; by default UTF-8, or that of the mark at the start of a file.
        overwrite_cache: Read the file even where its rows are stored.

    Raises:
        ValueError: Rows that cannot be read or lack a text; the message names file and line. Or there are no rows.
        FileNotFoundError: There is no such file.
        OSError: The rows cannot be stored.
    """
    files = find_files(argument, name, FILE_SUFFIXES)
    stored = _stored_name(files, columns, encoding)
    starts_anew, start = overwrite_cache or not datasets.is_caching_enabled(), time.time()
    with first_process_of_machine_first():
        is_stored = stored.exists() and not (starts_anew and stored.stat().st_mtime < start)
        if not is_stored:
            _store(_tables(argument, files, columns, encoding), stored, named(argument, name))
    return Dataset.from_file(str(stored))


def stream_file(argument: str, name: str, columns: Mapping[str, str], encoding: str | None = None) -> IterableDataset:
    """As `read_file`, but rows are read when they are needed, and nothing is stored."""
    files = find_files(argument, name, FILE_SUFFIXES)
    options = {"argument": argument, "files": files, "columns": dict(columns), "encoding": encoding}
    return IterableDataset.from_generator(_rows, features=FEATURES, gen_kwargs=options)


def stored_rows(rows: Dataset) -> Dataset:
    """Rows that were made in memory, from a file named after what they say beside the cache of `datasets`.

    What is made of them is found again by the next run. Where nothing can be stored, they stay in memory.

    Args:
        rows: With the text columns `source` and `target`.
    """
    if not datasets.is_caching_enabled():
        return rows
    table = rows.select_columns(list(ROLES)).with_format("arrow")[:].cast(FEATURES.arrow_schema)
    stored = _stored(repr((LAYOUT, table.to_pydict())))
    try:
        with first_process_of_machine_first():
            if not stored.exists():
                _store(iter([table]), stored, "the rows")
    except OSError:
        return rows
    return Dataset.from_file(str(stored)) if os.access(stored.parent, os.W_OK) else rows


def _rows(
    argument: str, files: Sequence[Path], columns: Mapping[str, str], encoding: str | None
) -> Iterator[dict[str, str]]:
    for file in files:
        for source, target, line in _texts(argument, file, columns, encoding):
            _check_characters(source + target, f"{named(argument, file)}, {place(file, line)}")
            yield {"source": source, "target": target}


def _texts(
    argument: str, file: Path, columns: Mapping[str, str], encoding: str | None
) -> Iterator[tuple[str, str, int]]:
    """Source, target and line of each row."""
    source_column, target_column = (columns[role] for role in ROLES)
    for line, row in records(argument, file, encoding):
        source, target = row.get(source_column), row.get(target_column)
        if not (type(source) is str and type(target) is str and source.strip() and target.strip()):
            source, target = record_texts(row, columns, f"{named(argument, file)}, {place(file, line)}")
        yield source, target, line


def _tables(
    argument: str, files: Sequence[Path], columns: Mapping[str, str], encoding: str | None
) -> Iterator[pyarrow.Table]:
    with tqdm(desc=f"Reading {argument}", unit=" rows") as bar:
        for file in files:
            rows = _texts(argument, file, columns, encoding)
            while batch := list(itertools.islice(rows, BATCH_ROWS)):
                sources, targets, lines = map(list, zip(*batch, strict=True))
                try:
                    yield pyarrow.table([sources, targets], schema=FEATURES.arrow_schema)
                except UnicodeEncodeError:
                    for source, target, line in batch:
                        _check_characters(source + target, f"{named(argument, file)}, {place(file, line)}")
                    raise
                bar.update(len(lines))


def _check_characters(text: str, where: str) -> None:
    """Refuse half of a surrogate pair, which JSON can write and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has {text[error.start : error.end]!r}, which is half of a character. Write the whole one, or "
            "remove it."
        ) from error


def _stored_name(files: Sequence[Path], columns: Mapping[str, str], encoding: str | None) -> Path:
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    content = repr((LAYOUT, states, [columns[role] for role in ROLES], encoding, [str(file) for file in files]))
    return _stored(content)


def _stored(content: str) -> Path:
    name = hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE) / "left_trainer" / f"{name}.arrow"


def _store(tables: Iterator[pyarrow.Table], path: Path, what: str) -> None:
    """Write `path`, whole or not at all."""
    first = next(tables, None)
    if first is None:
        raise ValueError(f"{what} is empty: it has no rows. Pass a file with at least one.")
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file, pyarrow.ipc.new_stream(file, FEATURES.arrow_schema) as stream:
            for table in itertools.chain((first,), tables):
                stream.write_table(table)
        beside.replace(path)
    except OSError as error:
        raise type(error)(
            f"The rows of {what} cannot be stored in {str(path.parent)!r}: {error.strerror or error}. Make room there, "
            "or set HF_DATASETS_CACHE to another folder."
        ) from error
    finally:
        beside.unlink(missing_ok=True)
