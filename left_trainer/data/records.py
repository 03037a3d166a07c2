"""Rows of JSON, CSV and Parquet files, each with its place in the file."""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from left_trainer.data.paths import named, suffix_of
from left_trainer.data.text_files import open_text

Record = tuple[int, dict[str, Any]]  # its line, counted from 1, and its columns
DELIMITERS = {".csv": ",", ".tsv": "\t"}
NAME_ENCODING = "If the file has another encoding, name it, for example --encoding latin-1."
FILE_SUFFIXES = (".jsonl", ".json", *DELIMITERS, ".parquet")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return row


DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def records(argument: str, file: Path, encoding: str | None = None) -> Iterator[Record]:
    """The rows of a file in their order.

    Values of CSV and TSV are the text in the file, `NA` and `007` too. A `ClassLabel` of a Parquet file is the name of
    the class; the place of a Parquet row is its number, counted from 1.

    Args:
        argument: That names the file, for errors.
        file: From `find_files`.
        encoding: Of text; by default that of its mark, else UTF-8.

    Raises:
        ValueError: The file is damaged or has another encoding; the message names the line.
    """
    suffix = suffix_of(file)
    if suffix == ".parquet":
        yield from _parquet_records(argument, file)
        return
    read: Callable[[str, TextIO], Iterator[Record]] = _json_records
    if suffix in DELIMITERS:
        read = lambda given, text: _csv_records(given, text, DELIMITERS[suffix])  # noqa: E731
    with open_text(argument, file, encoding, newline="" if suffix in DELIMITERS else None, fix=NAME_ENCODING) as text:
        yield from read(named(argument, file), text)


def place(file: Path, line: int) -> str:
    """`line 7`, or `row 7` in a file that has no lines."""
    return f"{'row' if suffix_of(file) == '.parquet' else 'line'} {line}"


def _json_records(given: str, text: TextIO) -> Iterator[Record]:
    lines: Iterator[tuple[int, str]] = ((number, line) for number, line in enumerate(text, 1) if not line.isspace())
    begin = list(itertools.islice(lines, 2))
    lines = itertools.chain(begin, lines)
    if begin and _is_whole_value(*(line for _, line in begin)):
        yield from _json_array(given, "".join(_with_blank_lines(lines)))
        return
    for number, line in lines:
        try:
            row = DECODER.decode(line.rstrip("\n"))
        except ValueError as error:
            raise ValueError(
                f"{given}, line {number} is no JSON: {_json_reason(error)}. Each line has to be an object of its own, "
                f'like {{"source": "text", "target": "text"}}. Mend the line, or remove it.'
            ) from error
        except RecursionError as error:
            raise ValueError(f"{given}, line {number} is nested too deeply. Mend the line, or remove it.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{given}, line {number} is {_kind(row)}. Each line has to be an object with columns.")
        yield number, row


def _with_blank_lines(lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    """The lines, and an empty one for each that was left out, so that a place in the text tells the line."""
    last = 0
    for number, line in lines:
        yield "\n" * (number - last - 1) + line
        last = number


def _is_whole_value(first: str, second: str | None = None) -> bool:
    """Whether a text of these first lines is one array, or one object that holds the rows, and not JSON lines."""
    if first.lstrip().startswith("["):
        return True
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        # An object of which more lines follow begins like this; anything else is a broken line.
        return first.strip() == "{" or (first.lstrip().startswith("{") and first.rstrip().endswith(("[", ",")))
    return second is None and isinstance(row, dict) and sum(map(_is_table, row.values())) == 1 == len(row)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _json_array(given: str, text: str) -> Iterator[Record]:
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise ValueError(
            f"{given}, line {line} is no JSON: {_json_reason(error)}. Mend it, or write one object a line."
        ) from error
    start = text.find("[") + 1
    if isinstance(whole, dict):
        tables = [name for name, value in whole.items() if _is_table(value)]
        if len(tables) != 1:
            raise ValueError(
                f"{given} is one object with the keys {', '.join(map(repr, whole))}, of which "
                f"{', '.join(map(repr, tables)) or 'none'} hold rows. Write one object a line, or an array of objects."
            )
        key = re.search(rf"{re.escape(json.dumps(tables[0]))}\s*:\s*\[", text)
        whole, start = whole[tables[0]], key.end() if key else start
    line, counted = 1, 0
    separator = re.compile(r"[\s,]*")
    for _ in whole:
        start = separator.match(text, start).end()  # type: ignore[union-attr]  # it matches nothing too
        line, counted = line + text.count("\n", counted, start), start
        try:
            row, start = DECODER.raw_decode(text, start)
        except ValueError as error:
            raise ValueError(f"{given}, line {line}: {_json_reason(error)}. Mend it.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{given}, line {line} has {_kind(row)} as a row. Each row has to be an object.")
        yield line, row


def _json_reason(error: BaseException) -> str:
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _kind(value: Any) -> str:
    kinds = {list: "an array", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _csv_records(given: str, text: TextIO, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # else a document of more than 128 KiB is refused
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{given}, line {line}: {error}. Write a quote inside of a quoted value twice, and close each."
            ) from error
        if not values:
            continue
        if header is None:
            header = _checked_header(given, line, values)
        elif len(values) != len(header):
            raise ValueError(
                f"{given}, line {line} has {len(values)} values for the {len(header)} columns {', '.join(header)}. Put "
                "a value that holds a delimiter or a line break in quotes, or mend the line."
            )
        else:
            yield line, dict(zip(header, values, strict=True))


def _checked_header(given: str, line: int, names: Sequence[str]) -> list[str]:
    double = next((name for name in names if name and names.count(name) > 1), None)
    if double is not None:
        raise ValueError(f"{given}, line {line} names the column {double!r} twice. Rename one of them.")
    return list(names)


def _parquet_records(argument: str, file: Path) -> Iterator[Record]:
    import pyarrow
    from datasets import ClassLabel, Features
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            features = Features.from_arrow_schema(table.schema_arrow)
            names = {column: kind.names for column, kind in features.items() if isinstance(kind, ClassLabel)}
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in table.iter_batches())
            for number, row in enumerate(rows, 1):
                for column, classes in names.items():
                    if row[column] in range(len(classes)):  # -1 stands for a label not given
                        row[column] = classes[row[column]]
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"{named(argument, file)} cannot be read as Parquet: {cause}. Write it again.") from error
