"""Writing text so that a kill leaves a whole file. Reports and comparisons use this too, and load no torch for it."""

from __future__ import annotations

from pathlib import Path

from left_trainer.storage.whole import whole_file


def write_whole(path: Path, text: str) -> None:
    """Write a text file. A kill or a full disk leaves the old file or the new one, never a part of it.

    Raises:
        WriteFailedError: The disk is full, read-only or gone.
    """
    content = text.encode()
    with whole_file(path, len(content)) as part:
        part.write_bytes(content)
