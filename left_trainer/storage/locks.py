"""One run to a folder: a second process that would write there is refused."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from left_trainer.storage.errors import write_errors

LOCK_FILE = ".left_trainer.lock"
_guard = threading.Lock()


class FolderInUseError(OSError):
    """Another process writes into the folder; the message names its machine and its number."""


@dataclass
class _Held:
    lock: FileLock
    uses: int


# Of this process, by path: it may train twice in one folder, as in a notebook.
_held: dict[Path, _Held] = {}


@contextlib.contextmanager
def folder_lock(folder: str | Path, name: str = "output_dir", lock_file: Path | None = None) -> Iterator[None]:
    """Keep other processes from writing into `folder` while inside; this process may enter again.

    The lock is the operating system's on a file: it ends with the process that holds it, killed or not, so that none is
    ever stale. Where a file system has no locks, the file itself is the lock, and counts as long as the process that it
    names runs, its start time included.

    Args:
        folder: Is made if it does not exist.
        name: Of the argument that chose the folder, for the message.
        lock_file: Where the lock is; by default in the folder.

    Raises:
        FolderInUseError: Another process is inside.
        WriteFailedError: The folder cannot be written.
    """
    path = (lock_file or Path(folder) / LOCK_FILE).absolute()
    with _guard:
        held = _held.get(path)
        if held is None:
            held = _held[path] = _Held(_locked(path, folder, name), 0)
        held.uses += 1
    try:
        yield
    finally:
        with _guard:
            held.uses -= 1
            if not held.uses:
                del _held[path]
                _release(held.lock, path)


def beside_lock(folder: str | Path) -> Path:
    """The lock of a folder that must not exist before it is whole."""
    target = Path(folder).absolute()
    return target.with_name(f".{target.name}.lock")


def check_folder_free(folder: str | Path, name: str = "output_dir") -> None:
    """Raise `FolderInUseError` where another process holds the lock of `folder`; a folder without a lock is left so."""
    if (Path(folder) / LOCK_FILE).exists():
        with folder_lock(folder, name):
            pass


def _locked(path: Path, folder: str | Path, name: str) -> FileLock:
    with write_errors(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, blocking=False, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise FolderInUseError(
                f"{name}={str(folder)!r} is in use by {_holder(path)}. Wait until it ends, stop it, or choose another "
                f"{name}."
            ) from None
        if not isinstance(lock, SoftFileLock):  # which writes the same itself
            try:
                path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n", encoding="utf-8")
            except BaseException:
                _release(lock, path)
                raise
    return lock


def _release(lock: FileLock, path: Path) -> None:
    if not isinstance(lock, SoftFileLock):
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held: who waits for it takes a file without a name for no lock
    with contextlib.suppress(OSError):
        lock.release()


def _holder(path: Path) -> str:
    try:
        pid, host, *_ = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return "another process"
    return f"process {pid} on {host}"
