"""Who runs a cell: a folder that one process alone can make, and that says for as long as that process lives.

The n-th claim of a cell is the folder `claim-n` in the cell's own. Making a folder is atomic on network file systems
too, so of all processes that try, one has the claim. Its owner changes the time of `owner.json` as long as it runs; at
its end it renames the file to `released.json`. A claim whose owner is silent for too long is not removed but followed
by the next one: nobody can take it for another's, and an owner that wakes up again finds that it has lost the cell.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from left_trainer.runs.json_records import from_json, read_json, to_json
from left_trainer.storage import owners
from left_trainer.storage.errors import write_errors

CLAIM = "claim-"
OWNER_FILE, RELEASED_FILE, RUN_FOLDER = "owner.json", "released.json", "run"
TAKEOVER_SECONDS = 120.0
BEATS = 8  # within the seconds after which an owner counts as gone
LONGEST_BEAT_SECONDS = 15.0  # a network file system may show a change as late as a minute after it


@dataclass(frozen=True)
class Owner:
    """Who has a claim.

    Args:
        host: Name of the machine, for people.
        process: As `owners.token` names it.
        takeover_seconds: The silence after which others may take the cell.
    """

    host: str
    process: str
    takeover_seconds: float

    @property
    def beat_seconds(self) -> float:
        """Between two signs of life."""
        return min(LONGEST_BEAT_SECONDS, self.takeover_seconds / BEATS)


@dataclass(frozen=True)
class Claim:
    """The n-th claim of the cell in a folder."""

    cell_folder: Path
    number: int

    @property
    def folder(self) -> Path:
        return self.cell_folder / f"{CLAIM}{self.number}"

    @property
    def run_folder(self) -> Path:
        """Where its owner runs the cell, so that two owners never write the same files."""
        return self.folder / RUN_FOLDER

    @property
    def is_released(self) -> bool:
        return (self.folder / RELEASED_FILE).exists()

    def take(self, takeover_seconds: float) -> Owner | None:
        """Make the claim that of this process. Returns `None` where another process was faster.

        Raises:
            WriteFailedError: The disk is full, read-only or gone.
        """
        with write_errors(self.folder):
            try:
                self.folder.mkdir()
            except FileExistsError:
                return None
            owner = Owner(socket.gethostname(), owners.token(), takeover_seconds)
            # Not flushed to the disk, which takes a moment: a kill in it would leave a claim of nobody.
            (self.folder / OWNER_FILE).write_text(json.dumps(to_json(owner)), encoding="utf-8")
            for earlier in claims(self.cell_folder)[:-1]:
                shutil.rmtree(earlier.run_folder, ignore_errors=True)
            self.run_folder.mkdir()
        return owner

    def beat(self) -> bool:
        """Give a sign of life. Returns whether the claim is still the last one of its cell."""
        with contextlib.suppress(OSError):
            os.utime(self.folder / OWNER_FILE)
        return last_claim(self.cell_folder) == self

    def release(self) -> None:
        """Let others have the cell at once."""
        with contextlib.suppress(OSError):
            (self.folder / OWNER_FILE).rename(self.folder / RELEASED_FILE)
        shutil.rmtree(self.run_folder, ignore_errors=True)

    def owner(self) -> Owner | None:
        """Who has it; `None` where that is not written yet, or it is released."""
        try:
            return from_json(Owner, read_json(self.folder / OWNER_FILE))
        except (OSError, ValueError):
            return None

    def last_beat(self) -> int | None:
        """When its owner gave the last sign of life, by the clock of the file system."""
        try:
            return (self.folder / OWNER_FILE).stat().st_mtime_ns
        except OSError:
            return None


def claims(cell_folder: Path) -> list[Claim]:
    """The claims of a cell, in order."""
    try:
        names = [entry.name.removeprefix(CLAIM) for entry in os.scandir(cell_folder) if entry.name.startswith(CLAIM)]
    except OSError:
        return []
    return [Claim(cell_folder, number) for number in sorted(int(name) for name in names if name.isdecimal())]


def last_claim(cell_folder: Path) -> Claim | None:
    """The claim that counts."""
    return next(reversed(claims(cell_folder)), None)


def n_lost(cell_folder: Path) -> int:
    """How many owners in a row were lost, up to the last: their claims are followed and not released."""
    found = claims(cell_folder)
    released = [number for number, claim in enumerate(found, 1) if claim.is_released]
    return len(found) - max(released, default=0)


class ClaimWatch:
    """Which claims are free, as this process sees it.

    The silence of an owner is measured by this process's own clock, from the moment it first saw the last sign of life:
    the clocks of machines and file systems need not agree. A process of this machine is asked for, and is known to be
    gone at once.

    Args:
        takeover_seconds: For claims that do not say it themselves, as their owner was killed before.
    """

    def __init__(self, takeover_seconds: float = TAKEOVER_SECONDS) -> None:
        self.takeover_seconds = takeover_seconds
        self._seen: dict[Claim, tuple[int | None, float]] = {}

    def free(self, cell_folder: Path) -> Claim | None:
        """The claim that may be tried next; `None` where the last one has a living owner."""
        last = last_claim(cell_folder)
        if last is None:
            return Claim(cell_folder, 1)
        if last.is_released or self._is_dead(last):
            return Claim(cell_folder, last.number + 1)
        return None

    def _is_dead(self, claim: Claim) -> bool:
        owner, beat, now = claim.owner(), claim.last_beat(), time.monotonic()
        if owner is not None and owners.has_ended(owner.process):
            return True
        if claim not in self._seen or self._seen[claim][0] != beat:
            self._seen[claim] = beat, now
        allowed = owner.takeover_seconds if owner is not None else self.takeover_seconds
        return now - self._seen[claim][1] >= allowed
