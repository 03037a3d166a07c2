"""Files and folders that are whole or absent, whenever the process that writes them is killed or the disk is full.

Everything is written beside its place, under a hidden name that says which process writes it, flushed, and renamed.
What a killed process leaves under such a name is swept by the next one that starts there.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from left_trainer.storage import owners
from left_trainer.storage.errors import write_errors

HIDDEN = re.compile(rf"\.(?P<name>.+)\.(?P<owner>{owners.TOKEN.pattern})-[0-9a-f]{{8}}\.(?P<kind>tmp|old|ready)")
# Read first by whoever loads a folder, so moved into it last.
READ_FIRST = ("config.json", "adapter_config.json", "results.jsonl")
# A model may be saved in another number of parts than before; loaders would mix them.
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


def hidden_name(path: Path, kind: str = "tmp") -> Path:
    """A hidden name beside `path`, for what this process will put there (`tmp`), puts there (`ready`) or replaces."""
    return path.with_name(f".{path.name}.{owners.token()}-{uuid.uuid4().hex[:8]}.{kind}")


@contextlib.contextmanager
def whole_file(path: str | Path, needed_bytes: int | None = None) -> Iterator[Path]:
    """A file to write into, which becomes `path` at the end: that stays as it was until then, and after an error.

    It gets the permissions that the umask gives to a new file, whatever writes it.

    Args:
        path: Its folder exists.
        needed_bytes: Its size, where it is known, for the message when the disk is full.

    Raises:
        WriteFailedError: The disk is full, read-only or gone.
    """
    target = Path(path)
    with write_errors(target, needed_bytes):
        part = hidden_name(target)
        try:
            part.touch()
            mode = stat.S_IMODE(part.stat().st_mode)
            yield part
            part.chmod(mode)
            _flush(part)
            part.replace(target)
            _flush(target.parent)
        finally:
            with contextlib.suppress(OSError):
                part.unlink()


@contextlib.contextmanager
def whole_directory(directory: str | Path, needed_bytes: int | None = None) -> Iterator[Path]:
    """A folder to write into, which becomes `directory` at the end: that is whole or absent.

    The folder is a hidden one beside `directory`. Its files are flushed and it is renamed into place; an existing
    `directory` is replaced, or left as it was when an error is raised inside or the renaming fails.

    Args:
        directory: Its parents are made.
        needed_bytes: Its size, where it is known, for the message when the disk is full.

    Raises:
        WriteFailedError: The disk is full, read-only or gone.
    """
    target = Path(directory)
    target = target.resolve() if target.is_symlink() else target
    with write_errors(target, needed_bytes):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent, target.name)
        beside = hidden_name(target)
        try:
            beside.mkdir()
            yield beside
            finish(beside)
            put_in_place(beside, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def whole_files(directory: str | Path, needed_bytes: int | None = None) -> Iterator[Path]:
    """A folder to write files into, which all move into `directory` at the end, beside what is there.

    Once every file is written and flushed the folder is renamed, and from then on they are what `directory` holds: a
    process that is killed while it moves them is made up for by `sweep`. Until then, and after an error, `directory` is
    as it was.

    Args:
        directory: Is made if it does not exist.
        needed_bytes: Size of the files, where it is known, for the message when the disk is full.

    Raises:
        WriteFailedError: The disk is full, read-only or gone.
    """
    target = Path(directory)
    with write_errors(target, needed_bytes):
        target.mkdir(parents=True, exist_ok=True)
        beside = hidden_name(target / "files")
        try:
            beside.mkdir()
            yield beside
            finish(beside)
            ready = beside.rename(beside.with_suffix(".ready"))
            _move_into(ready, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def sweep(directory: str | Path, name: str | None = None) -> None:
    """Finish or remove what killed processes have left in `directory`; nothing of a process that still runs.

    Files that were complete are moved into place, and a folder that was about to be replaced comes back where its
    successor did not arrive.

    Args:
        directory: Need not exist, nor be writable.
        name: Only what is to become this file or folder.
    """
    with contextlib.suppress(OSError):
        for path in sorted(Path(directory).iterdir()):
            match = HIDDEN.fullmatch(path.name)
            if match is None or name not in (None, match["name"]) or owners.is_alive(match["owner"], path):
                continue
            with contextlib.suppress(OSError):
                _sweep_one(path, match["kind"], path.parent / match["name"])


def _sweep_one(path: Path, kind: str, target: Path) -> None:
    if kind == "ready":
        _move_into(path, path.parent)
    elif kind == "old" and not os.path.lexists(target):
        path.rename(target)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def put_in_place(beside: Path, target: Path) -> None:
    if not os.path.lexists(target):
        beside.rename(target)
        _flush(target.parent)
        return
    old = target.rename(hidden_name(target, "old"))
    try:
        beside.rename(target)
    except BaseException:
        old.rename(target)
        raise
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _move_into(ready: Path, target: Path) -> None:
    files = [path.relative_to(ready) for path in ready.rglob("*") if path.is_file()]
    if any(fnmatch.fnmatch(str(file), pattern) for file in files for pattern in WEIGHTS):
        for old in (path for pattern in WEIGHTS for path in target.glob(pattern)):
            if old.relative_to(target) not in files:
                old.unlink(missing_ok=True)
    for file in sorted(files, key=lambda file: (file.name in READ_FIRST, file)):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        (ready / file).replace(target / file)
    _flush(target)
    shutil.rmtree(ready, ignore_errors=True)


def finish(folder: Path) -> None:
    """Flush the files of a new folder, and give them the permissions that the umask gives: some libraries do not."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            path.chmod(mode)
        if path.is_file() or path.is_dir():
            _flush(path)


def _flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before what follows."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
