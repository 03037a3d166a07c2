"""Full, read-only and vanished disks: one sentence, and the earlier state stays."""

from __future__ import annotations

from collections.abc import Iterator

from torture.case import Case


def cases() -> Iterator[Case]:
    yield from ()
