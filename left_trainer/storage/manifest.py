"""What a folder must hold to be whole: names, sizes and checksums of its files, written last."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash
from safetensors import safe_open

MANIFEST_FILE = "checkpoint_manifest.json"
CHECKSUM = "checksum"  # of the rest of the manifest
BLOCK_BYTES = 2**22


def write_manifest(folder: str | Path, entries: Mapping[str, Any]) -> None:
    """Describe every file in `folder`, and add `entries`."""
    root = Path(folder)
    files = {
        path.relative_to(root).as_posix(): {"bytes": path.stat().st_size, "xxh3_128": checksum(path)}
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
    content = {"files": files, **entries}
    text = json.dumps({**content, CHECKSUM: _checksum_of(content)}, indent=2, ensure_ascii=False)
    (root / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """What `write_manifest` wrote; `None` where it did not.

    Raises:
        ValueError: The file is damaged.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        described = manifest["files"]
        complete = all(isinstance(each["bytes"], int) and each["xxh3_128"] for each in described.values())
        complete = complete and manifest.pop(CHECKSUM) == _checksum_of(manifest)
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise ValueError(f"{MANIFEST_FILE} is damaged")
    return manifest


def why_not_whole(folder: str | Path) -> str | None:
    """What is missing in or wrong with `folder`; `None` where it is whole.

    A folder without a manifest, written by another trainer or an earlier version, is judged by opening its files.
    """
    root = Path(folder)
    try:
        manifest = read_manifest(root)
        return _why_not_openable(root) if manifest is None else _why_not_as_described(root, manifest)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{Path(error.filename or root).name} cannot be read ({error.strerror or error})"


def _why_not_as_described(root: Path, manifest: Mapping[str, Any]) -> str | None:
    for name, described in manifest["files"].items():
        path = root / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != described["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes, not {described['bytes']:,}"
    for name, described in manifest["files"].items():
        if checksum(root / name) != described["xxh3_128"]:
            return f"{name} has been changed: its checksum is another"
    return None


def checksum(path: Path) -> str:
    """Of a file; XXH3, which finds damage at the speed of memory and does not guard against forgery."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _checksum_of(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


# Folders without a manifest


def _why_not_openable(root: Path) -> str | None:
    for path in sorted(root.rglob("*")):
        read = READERS.get(path.suffix)
        if not path.is_file() or read is None:
            continue
        try:
            read(path)
        except Exception:  # zipfile raises a dozen kinds for damaged archives
            return f"{path.relative_to(root).as_posix()} cannot be read"
    return None


def _read_json(path: Path) -> None:
    """An index names the files of weights in several parts, all of which have to be there."""
    content = json.loads(path.read_bytes())
    if path.name.endswith(".index.json"):
        missing = [name for name in set(content["weight_map"].values()) if not (path.parent / name).is_file()]
        if missing:
            raise FileNotFoundError(missing)


def _read_safetensors(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        file.keys()


def _read_archive(path: Path) -> None:
    """What `torch.save` writes is a zip archive with a checksum for each part; nothing is unpickled."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise ValueError(path)


READERS: dict[str, Callable[[Path], None]] = {
    ".json": _read_json,
    ".safetensors": _read_safetensors,
    ".bin": _read_archive,
    ".pt": _read_archive,
    ".pth": _read_archive,
}
