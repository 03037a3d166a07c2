"""Values that must be found nowhere, and looking for them in everything that a command leaves."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

# One that looks like a token of the hub, and one that looks like nothing.
TOKEN = "hf_PlantedPlantedPlantedPlanted0001"
PASSWORD = "planted-pass-word-0002"
SECRETS = (TOKEN, PASSWORD)


def leaks(folder: Path, *texts: str) -> list[str]:
    """The files below `folder`, and members of those that are archives, with a planted value in them; and `texts`."""
    found = [name for name, content in _contents(folder) if any(value.encode() in content for value in SECRETS)]
    return found + [text for text in texts if any(value in text for value in SECRETS)]


def _contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        yield str(path), str(path).encode()
        if path.is_file():
            yield str(path), path.read_bytes()
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    yield from ((f"{path}/{name}", archive.read(name)) for name in archive.namelist())
