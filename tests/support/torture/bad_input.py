"""Bad input to every entry point: one paragraph before weights load, nothing overwritten."""

from __future__ import annotations

from collections.abc import Iterator

from torture.case import Case


def cases() -> Iterator[Case]:
    yield from ()
