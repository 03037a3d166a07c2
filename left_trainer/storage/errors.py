"""What a disk refuses, in one sentence, whichever library noticed it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than files may be here (ulimit -f)",
}
REFUSED = {
    errno.EROFS: "its disk is read-only",
    errno.EACCES: "you have no permission to write there",
    errno.EPERM: "you have no permission to write there",
}
GONE = {
    errno.ENOENT: "its folder no longer exists (removed, or its disk is no longer mounted)",
    errno.ENOTDIR: "a part of its path is a file",
    errno.ESTALE: "its folder no longer exists (removed, or its disk is no longer mounted)",
}
BROKEN = {errno.EIO: "the disk reports an input/output error", errno.ENXIO: "its disk is gone"}
# safetensors, Python's OSError inside of other errors.
NUMBERED = re.compile(r"(?:os error |\[Errno )(\d+)")
NAMED_PATH = re.compile(r'at path "([^"]+)"')
# torch.save reports what its C++ code met without an error number.
OF_TORCH_SAVE = re.compile(r"PytorchStreamWriter|inline_container|iostream error|Parent directory .* does not exist")


class WriteFailedError(OSError):
    """A file could not be written; the message is one sentence that names it, the reason and the fix."""

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.errno = number


@contextlib.contextmanager
def write_errors(path: str | Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Raise a `WriteFailedError` about `path` in place of what a library raises when the disk refuses a write.

    Args:
        path: The file or folder that is being written.
        needed_bytes: Its size, where it is known.
    """
    target = Path(path)
    try:
        yield
    except WriteFailedError:
        raise
    except Exception as error:
        number = _refusal(error, target)
        if number is None:
            raise
        raise WriteFailedError(_sentence(target, number, needed_bytes), number) from error


def shown_bytes(number: int) -> str:
    """`1.5 MiB`."""
    size, units = float(number), iter(("bytes", "KiB", "MiB", "GiB"))
    unit = next(units)
    for larger in units:
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


def _refusal(error: Exception, target: Path) -> int | None:
    """The error number where the disk is what `error` is about, else `None`."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        number: int | None = error.errno
    elif match := NUMBERED.search(text):
        number = int(match.group(1))
    elif OF_TORCH_SAVE.search(text):
        number = _try_to_write(_existing(target)) or (errno.ENOENT if "Parent directory" in text else errno.ENOSPC)
    else:
        return None
    if number in FULL or number in BROKEN or number == errno.EROFS:
        return number
    # These are about one path, which need not be the one that is written: reading fails with them too.
    path = _path_of(error) or target
    if number in GONE:
        folder = next(part for part in path.parents if not part.name.endswith(".tmp"))  # those are removed after errors
        return number if path.is_relative_to(target.parent) and not folder.is_dir() else None
    if number in REFUSED:
        return number if _try_to_write(_existing(target)) else None
    return None


def _path_of(error: Exception) -> Path | None:
    if isinstance(error, OSError) and isinstance(error.filename, str | os.PathLike):
        return Path(error.filename)
    match = NAMED_PATH.search(str(error))
    return Path(match.group(1)) if match else None


def _existing(path: Path) -> Path:
    """The nearest of `path` and its parents that exists."""
    return next((part for part in (path, *path.parents) if part.exists()), Path())


def _try_to_write(path: Path) -> int | None:
    """The error number that a new file beside or in `path` is refused with; `None` where it is not."""
    probe = (path if path.is_dir() else path.parent) / f".probe-{uuid.uuid4().hex}"
    try:
        probe.write_bytes(b"left_trainer")
    except OSError as error:
        return error.errno
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return None


def _sentence(target: Path, number: int, needed_bytes: int | None) -> str:
    reason = {**FULL, **REFUSED, **GONE, **BROKEN}.get(number) or os.strerror(number)
    fix = "choose a folder that can be written"
    if number in FULL:
        fix = "free space there or choose a folder on another disk"
        reason += f" ({_space(target, needed_bytes)})"
    return (
        f"{str(target)!r} cannot be written because {reason}: {fix}, and start the same command again; what was "
        "written before is left as it was."
    )


def _space(target: Path, needed_bytes: int | None) -> str:
    needed = "" if needed_bytes is None else f"{shown_bytes(needed_bytes)} needed, "
    try:
        return f"{needed}{shown_bytes(shutil.disk_usage(_existing(target)).free)} free"
    except OSError:
        return f"{needed}none free"
