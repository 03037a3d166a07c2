"""What a teacher says of the training rows, kept on disk: its best tokens at each target.

A row is found by a digest of its tokens, without what fills it up, so that neither the order of the rows nor the other
rows of a batch matter. Rows that are new to the cache are added, and those that are there are not computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from left_trainer.compression.teacher import Lesson
from left_trainer.compression.teacher_key import digest
from left_trainer.kernels.linear_divergence import Head, TopTokens
from left_trainer.models import ModelFamily
from left_trainer.storage.whole import whole_file
from left_trainer.token_mean import IGNORE_INDEX

DIGEST_BYTES = 16
PART_BYTES = 64 * 2**20
ROWS_AT_ONCE = 256  # positions whose logits are in memory together
KEY_FILE = "key.json"


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    Args:
        family: Of the student.
        pad_token_id: Fills up rows in batches that have no attention mask.
    """

    family: ModelFamily
    pad_token_id: int | None = None

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Positions `(batch, target)` at which a target is predicted: of a decoder-only model the one before it."""
        is_target = labels.ne(IGNORE_INDEX)
        if self.family == "encoder_decoder":
            return is_target
        return torch.cat([is_target[:, 1:], torch.zeros_like(is_target[:, :1])], dim=1)

    def digests(self, inputs: Mapping[str, Any]) -> list[bytes]:
        """Of the tokens and targets of each row of a batch."""
        ids, labels = (inputs[name].cpu().numpy() for name in ("input_ids", "labels"))
        mask = inputs["attention_mask"].cpu().numpy().astype(bool) if "attention_mask" in inputs else None
        return [
            self._digest(row, targets, None if mask is None else mask[number])
            for number, (row, targets) in enumerate(zip(ids, labels, strict=True))
        ]

    def _digest(self, ids: np.ndarray, labels: np.ndarray, mask: np.ndarray | None) -> bytes:
        together = self.family == "decoder_only"
        if mask is None:
            fills = (ids == self.pad_token_id) & (labels == IGNORE_INDEX if together else True)
            mask = _inside(~fills)
        labels = labels[mask] if together else labels[_inside(labels != IGNORE_INDEX)]
        own = (ids[mask].astype(np.int64), labels.astype(np.int64))
        content = b"".join(np.int64(len(part)).tobytes() + part.tobytes() for part in own)
        return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def _inside(own: np.ndarray) -> np.ndarray:
    """The positions from the first to the last that is not filled up."""
    places = np.flatnonzero(own)
    inside = np.zeros_like(own)
    if len(places):
        inside[places[0] : places[-1] + 1] = True
    return inside


def best_tokens(
    said: Head | TopTokens | torch.Tensor, where: torch.Tensor, k: int, temperature: float, n_words: int
) -> TopTokens:
    """A teacher's best tokens, with their log-probabilities at a temperature, `(positions, k)`.

    Args:
        said: Of a batch.
        where: `(batch, target)`, the positions that are kept.
        k: Number of tokens.
        temperature: Above 0.
        n_words: Words at the start of the vocabulary that student and teacher share.
    """
    assert not isinstance(said, TopTokens)
    rows = (said.hidden if isinstance(said, Head) else said)[where]
    found = [_best_of(_logits(said, part)[:, :n_words], k, temperature) for part in rows.split(ROWS_AT_ONCE)]
    ids, log_probs = zip(*found, strict=True) if found else ((rows.new_empty(0, k, dtype=torch.long),),) * 2
    return TopTokens(torch.cat(ids), torch.cat(log_probs))


def _best_of(logits: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    best = torch.log_softmax(logits.float() / temperature, dim=-1).topk(k)
    return best.indices, best.values


def _logits(said: Head | torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return rows if isinstance(said, torch.Tensor) else replace(said, hidden=rows).full_logits()


class _Place(NamedTuple):
    """Where a row is: in which part, from which position to which."""

    part: int
    start: int
    stop: int


class TeacherCache:
    """Best tokens by row, in parts that are whole or absent.

    Args:
        folder: Where caches are, shared by all processes.
        key: What is kept depends on.
        k: Tokens at each position.
        n_words: As in `best_tokens`.
        reading: How rows are read.
    """

    def __init__(self, folder: str | Path, key: Mapping[str, Any], k: int, n_words: int, reading: Reading) -> None:
        self.key, self.k, self.n_words, self.reading = dict(key), k, n_words, reading
        self.folder = Path(folder) / f"teacher_cache-{digest(self.key)}"
        self._parts: list[Any] = []
        self._places: dict[bytes, _Place] = {}

    @property
    def bytes_per_target(self) -> int:
        """On disk."""
        return self.k * (np.dtype(self._id_type).itemsize + np.dtype(np.float32).itemsize)

    @property
    def _id_type(self) -> type[np.generic]:
        return np.uint16 if self.n_words <= 2**16 else np.int32

    def __contains__(self, row: bytes) -> bool:
        return row in self._places

    def open(self) -> None:
        """Find what is on disk."""
        self._parts, self._places = [], {}
        for path in sorted(self.folder.glob("part-*.safetensors")):
            part = safe_open(path, framework="np")
            rows, counts = part.get_tensor("rows"), part.get_tensor("counts")
            stops = counts.cumsum()
            for row, start, stop in zip(rows, stops - counts, stops, strict=True):
                self._places[row.tobytes()] = _Place(len(self._parts), int(start), int(stop))
            self._parts.append(part)

    def write(self, process: int, batches: Iterable[Sequence[tuple[bytes, TopTokens]]]) -> None:
        """Keep rows, in parts of some tens of MiB.

        Args:
            process: That writes.
            batches: Rows, with what the teacher says of each.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / KEY_FILE) as path:
            path.write_text(json.dumps(self.key, indent=2) + "\n", encoding="utf-8")
        held: list[tuple[bytes, TopTokens]] = []
        n_bytes = 0
        for batch in batches:
            held += batch
            n_bytes += sum(len(said.token_ids) for _, said in batch) * self.bytes_per_target
            if n_bytes >= PART_BYTES:
                self._write_part(process, held)
                held, n_bytes = [], 0
        if held:
            self._write_part(process, held)

    def _write_part(self, process: int, rows: Sequence[tuple[bytes, TopTokens]]) -> None:
        numbers = (number for number in range(10**9) if not self._part(process, number).exists())
        tokens = [said for _, said in rows]
        content: dict[str, np.ndarray] = {
            "rows": np.frombuffer(b"".join(row for row, _ in rows), np.uint8).reshape(-1, DIGEST_BYTES),
            "counts": np.array([len(said.token_ids) for said in tokens], np.int64),
            "token_ids": np.concatenate([said.token_ids.cpu().numpy() for said in tokens]).astype(self._id_type),
            "log_probs": np.concatenate([said.log_probs.float().cpu().numpy() for said in tokens]),
        }
        size = sum(array.nbytes for array in content.values())
        with whole_file(self._part(process, next(numbers)), size) as path:
            save_file(content, path)

    def _part(self, process: int, number: int) -> Path:
        return self.folder / f"part-{process:05d}-{number:05d}.safetensors"

    def lesson(self, inputs: Mapping[str, Any]) -> Lesson:
        """What the teacher says of a batch of rows that are kept.

        Raises:
            ValueError: A row is none of those.
        """
        labels = inputs["labels"]
        where = self.reading.targets(labels)
        # Rows without a target only fill up the last batch of several processes.
        counted = zip(self.reading.digests(inputs), where.any(dim=1).tolist(), strict=True)
        found = [self._read(row) for row, has_target in counted if has_target]
        shape = (*labels.shape, self.k)
        token_ids = torch.zeros(shape, dtype=torch.long, device=labels.device)
        log_probs = torch.zeros(shape, dtype=torch.float32, device=labels.device)
        if not found:
            return Lesson(TopTokens(token_ids, log_probs))
        token_ids[where] = torch.from_numpy(np.concatenate([ids for ids, _ in found])).to(labels.device)
        log_probs[where] = torch.from_numpy(np.concatenate([values for _, values in found])).to(labels.device)
        return Lesson(TopTokens(token_ids, log_probs))

    def _read(self, row: bytes) -> tuple[np.ndarray, np.ndarray]:
        place = self._places.get(row)
        if place is None:
            raise ValueError(
                f"cache_teacher={self.k} has nothing of a row of this batch in {str(self.folder)!r}: the rows differ "
                "from those of train_dataset as it was when the training began. Let the data collator only fill rows "
                "up, or run the teacher in each step: cache_teacher=0."
            )
        part = self._parts[place.part]
        ids, values = (part.get_slice(name)[place.start : place.stop] for name in ("token_ids", "log_probs"))
        return ids.astype(np.int64), values


def by_row(said: TopTokens, where: torch.Tensor) -> Iterator[TopTokens]:
    """`said`, of all positions of a batch that are kept, row by row."""
    counts = where.sum(dim=1).tolist()
    for ids, values in zip(said.token_ids.split(counts), said.log_probs.split(counts), strict=True):
        yield replace(said, token_ids=ids, log_probs=values)
