"""Files as a user names them: literally, and only where there is no such file as a pattern."""

from __future__ import annotations

import glob
import logging
from collections.abc import Sequence
from pathlib import Path

from left_trainer.registry import did_you_mean

logger = logging.getLogger(__name__)

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}


def find_files(argument: str, name: str, suffixes: Sequence[str] | None = None) -> list[Path]:
    """The file of that name, or the files that match it as a pattern, which is then said.

    Args:
        argument: That holds the name, for errors.
        name: Path of one file; a pattern with `*`, `?` or `[...]` where there is no such file.
        suffixes: Allowed endings; one of `COMPRESSED` may follow. By default any.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A folder or a pipe, or another ending.
        PermissionError: It cannot be read.
    """
    given = Path(name)
    path = given if given.exists() or given.is_symlink() else given.expanduser()
    files = [path] if path.exists() else _matches(argument, name)
    if not files:
        raise FileNotFoundError(f"{named(argument, name)} does not exist.{_hint(path)} {_how_to_name(name)}")
    for file in files:
        _check(argument, file, suffixes)
    return files


def named(argument: str, name: str | Path) -> str:
    """An argument and its value as a user writes them: `train_file='rows.jsonl'`, `--input_file 'texts'`."""
    return f"{argument}{' ' if argument.startswith('--') else '='}{str(name)!r}"


def suffix_of(file: Path) -> str:
    """`.jsonl` of `rows.jsonl` and of `rows.jsonl.gz`, in lower case."""
    return Path(file.stem if file.suffix.lower() in COMPRESSED else file.name).suffix.lower()


def _matches(argument: str, name: str) -> list[Path]:
    pattern = str(Path(name).expanduser())
    files = [Path(match) for match in sorted(glob.glob(pattern))]  # noqa: PTH207 (Path.glob refuses some names)
    files = [file for file in files if file.is_file()] if glob.has_magic(name) else []
    if files:
        found = ", ".join(map(str, files))
        logger.warning("%s is no file. As a pattern it matches %d: %s.", named(argument, name), len(files), found)
    return files


def _hint(path: Path) -> str:
    try:
        return did_you_mean(path.name, [other.name for other in path.parent.iterdir()])
    except OSError:
        return f" There is no folder {str(path.parent)!r}." if not path.parent.exists() else ""


def _how_to_name(name: str) -> str:
    if name == "-":
        return "Standard input cannot be read more than once: write the rows to a file, and pass that."
    if "://" in name:
        return "Only local files are read: download it first, or pass a data set of the Hub as dataset_name."
    return f"Check the path; it is read from {str(Path.cwd())!r}."


def _check(argument: str, file: Path, suffixes: Sequence[str] | None) -> None:
    given = named(argument, file)
    if file.is_dir():
        raise ValueError(f"{given} is a folder. Pass a file in it.")
    if not file.is_file():
        raise ValueError(f"{given} is no plain file, and what is in it can be read only once. Write it to a file.")
    if suffixes is not None and suffix_of(file) not in suffixes:
        allowed = f"{', '.join(suffixes)}, each also compressed ({', '.join(COMPRESSED)})"
        raise ValueError(f"{given} ends in {file.suffix!r}. Allowed: {allowed}.")
    try:
        file.open("rb").close()
    except OSError as error:
        raise type(error)(f"{given} cannot be read: {error.strerror}. Check its permissions.") from error
