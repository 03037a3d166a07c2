"""Writing text so that a kill leaves a whole file. Reports and comparisons use this too, and load no torch for it."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text file. A kill leaves the old file or the new one, never a part of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
