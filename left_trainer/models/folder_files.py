"""Files of a model or an adapter that cannot be read, by name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

MAX_CAUSE_LENGTH = 300
# Those that a library reads of the folder of a model or an adapter.
JSON_FILES = (
    "*_config.json", "*_map.json", "*.index.json", "added_tokens.json", "config.json", "tokenizer.json",
)  # fmt: skip
WEIGHT_FILES = ("*.safetensors", "*.bin")
LENGTH_BYTES = 8  # in front of the header of a safetensors file


@contextlib.contextmanager
def reading(what: str, path: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads `path` into a `ValueError` that names the file.

    Args:
        what: The argument, `model` for example.
        path: Folder, or name on the hub.

    Raises:
        ValueError: Something was raised inside.
    """
    try:
        yield
    except Exception as error:  # tokenizers raises Exception itself, safetensors and json classes of their own
        cause = " ".join(str(error).split())[:MAX_CAUSE_LENGTH]
        found = broken_file(path)
        reason = found or f"The loader said: {cause}"
        raise ValueError(f"{what}={path!r} cannot be read. {reason}") from error


def broken_file(folder: str) -> str | None:
    """A sentence about the first JSON or safetensors file in a local folder that is not whole; `None` if all are."""
    if not Path(folder).is_dir():
        return None
    for path in sorted(path for pattern in JSON_FILES for path in Path(folder).glob(pattern)):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            return f"{path.name} is not valid JSON ({' '.join(str(error).split())}). Copy the file again."
        if not isinstance(content, dict):
            return f"{path.name} must hold a JSON object and holds a {type(content).__name__}. Copy the file again."
    for path in sorted(Path(folder).glob("*.safetensors")):
        reason = why_not_whole(path)
        if reason:
            return f"{path.name} {reason}. Copy the file again."
    return None


def why_not_whole(path: Path) -> str | None:
    """Why a safetensors file cannot be loaded, from its header and its size; `None` where it can."""
    with path.open("rb") as file:
        start = file.read(LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        size = path.stat().st_size
        if len(start) < LENGTH_BYTES or LENGTH_BYTES + length > size:
            return "is not a safetensors file, or was cut off"
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError):
            return "is not a safetensors file"
    expected = LENGTH_BYTES + length + max(ends, default=0)
    return None if size == expected else f"has {size:,} bytes and its header promises {expected:,}: it was cut off"


def check_folder(folder: str, is_adapter: bool) -> None:
    """Check the files of a local folder, as far as that is done without reading tensors; other names are left alone.

    Raises:
        FileNotFoundError: An adapter without weights.
        ValueError: A file that is not JSON, or is cut off.
    """
    reason = broken_file(folder)
    if reason:
        raise ValueError(f"model={folder!r} cannot be read. {reason}")
    if is_adapter and not any((Path(folder) / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise FileNotFoundError(
            f"model={folder!r} has {CONFIG_NAME} and no {SAFETENSORS_WEIGHTS_NAME}: the adapter has no weights. Copy "
            "the whole folder, or pass another one."
        )


def check_has_weights(folder: str) -> None:
    """Raise `FileNotFoundError` where a local folder holds no weights of a model. Other names are left alone."""
    if Path(folder).is_dir() and not any(file for pattern in WEIGHT_FILES for file in Path(folder).glob(pattern)):
        raise FileNotFoundError(
            f"model={folder!r} has no weights ({', '.join(WEIGHT_FILES)}). Copy the whole folder, or pass another one."
        )
