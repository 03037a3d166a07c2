"""Frozen records as JSON and back, each field checked, and JSON files that a kill leaves whole."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from left_trainer.adapters.text_files import write_whole

Record = TypeVar("Record")
SHOWN_LENGTH = 60
SCALARS: dict[type, tuple[str, tuple[type, ...]]] = {
    str: ("a string", (str,)),
    bool: ("true or false", (bool,)),
    int: ("an integer", (int,)),
    float: ("a number", (int, float)),
}


def to_json(value: Any) -> Any:
    """`value` as JSON values: a record as an object, a tuple as a list, a number that is not finite as `None`.

    A field that may be left out, whose default is `None`, is left out where it is `None`.
    """
    if dataclasses.is_dataclass(value):
        fields = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return {field.name: to_json(item) for field, item in fields if item is not None or field.default is not None}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(record: type[Record], content: Any, name: str = "") -> Record:
    """The record that JSON values describe. Keys that the record does not have are ignored.

    Args:
        record: A dataclass whose fields are scalars, literals, records, tuples, string-keyed mappings, or optional.
        content: As `json.loads` returns it.
        name: Of the field that holds the record, for errors.

    Raises:
        ValueError: A field is missing or has another type; the message names it.
    """
    content = _mapping(content, name)
    types_of = _field_types(record)  # type: ignore[arg-type]
    values = {}
    for field in dataclasses.fields(record):  # type: ignore[arg-type]
        path = f"{name}.{field.name}" if name else field.name
        if field.name in content:
            values[field.name] = _decode(types_of[field.name], content[field.name], path)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"the field {path!r} is missing.")
    return record(**values)


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises `ValueError` where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"it is not valid JSON ({error}).") from error


def json_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a JSONL file that hold something, with their numbers, which count from 1.

    Only a newline ends a line: `str.splitlines` also ends one at U+2028, U+2029 and U+0085, which JSON leaves in texts.
    """
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole."""
    write_whole(path, json.dumps(to_json(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@functools.cache
def _field_types(record: type) -> dict[str, Any]:
    return get_type_hints(record)


def _decode(kind: Any, value: Any, name: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else _decode(inner, value, name)
    if origin is Literal:
        return _literal(arguments, value, name)
    if origin is tuple:
        return _tuple(arguments, value, name)
    if origin is not None and issubclass(origin, Mapping):
        return {key: _decode(arguments[1], item, f"{name}.{key}") for key, item in _mapping(value, name).items()}
    if dataclasses.is_dataclass(kind):
        return from_json(kind, value, name)  # type: ignore[arg-type]
    expected, allowed = SCALARS[kind]
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise _wrong(name, expected, value)
    return value


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(name, "a JSON object", value)
    return value


def _literal(allowed: tuple[Any, ...], value: Any, name: str) -> Any:
    if value not in allowed:
        raise _wrong(name, f"one of {', '.join(map(str, allowed))}", value)
    return value


def _tuple(kinds: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(name, "a list", value)
    if Ellipsis in kinds:
        kinds = (kinds[0],) * len(value)
    if len(value) != len(kinds):
        raise _wrong(name, f"a list of {len(kinds)} values", value)
    return tuple(
        _decode(kind, item, f"{name}[{index}]") for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _wrong(name: str, expected: str, value: Any) -> ValueError:
    shown = repr(value) if len(repr(value)) <= SHOWN_LENGTH else f"{repr(value)[:SHOWN_LENGTH]}..."
    return ValueError(f"{f'the field {name!r}' if name else 'the content'} must be {expected}, got {shown}.")
