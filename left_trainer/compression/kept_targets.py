"""The targets that a teacher has written, on disk: appended batch by batch, and found again by what they depend on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from left_trainer.compression.teacher_key import digest
from left_trainer.storage.whole import whole_file


class KeptTargets:
    """The targets that a teacher has written, in JSON lines: their key in the first, a row and its text in each other.

    While it writes, each process appends to a part of its own. A line that a killed process has not finished does not
    count. The name has a digest of the key, so that answers of another teacher, to other prompts or of other settings
    are neither taken for these nor replaced by them.

    Args:
        folder: Shared by all processes.
        key: What the texts depend on.
    """

    def __init__(self, folder: str | Path, key: Mapping[str, Any]) -> None:
        self.key = json.loads(json.dumps(key))
        self.path = Path(folder) / f"teacher_targets-{digest(self.key)}.jsonl"

    def read(self) -> dict[int, str]:
        """The texts by row, of the whole file and of the parts of one that is not finished."""
        texts: dict[int, str] = {}
        for path in (*self._parts(), self.path):
            if path.is_file():
                texts |= self._texts(path)
        return texts

    @contextlib.contextmanager
    def appending(self, process: int) -> Iterator[Any]:
        """A function that adds texts by row to the part of a process, and has them on the disk when it returns."""
        path = self.path.with_name(f"{self.path.name}.part{process}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            whole = path.read_bytes()
            os.truncate(path, whole.rfind(b"\n") + 1)
        with path.open("a", encoding="utf-8") as file:
            if not file.tell():
                file.write(_line({"key": self.key}))

            def append(texts: Mapping[int, str]) -> None:
                file.writelines(_line({"row": row, "text": text}) for row, text in texts.items())
                file.flush()
                os.fsync(file.fileno())

            yield append

    def finish(self, texts: Mapping[int, str]) -> None:
        """Write all of them into the whole file, in the order of the rows, and remove the parts."""
        with whole_file(self.path) as path:
            lines = [_line({"row": row, "text": texts[row]}) for row in sorted(texts)]
            path.write_text(_line({"key": self.key}) + "".join(lines), encoding="utf-8")
        for part in self._parts():
            part.unlink()

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.name}.part*"))

    def _texts(self, path: Path) -> dict[int, str]:
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last end of line is not finished
        read = [json.loads(line) for line in lines]
        if not read or read[0].get("key") != self.key:
            return {}
        return {entry["row"]: entry["text"] for entry in read[1:]}


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
