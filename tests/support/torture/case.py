"""One attempt to lose something, and what must happen."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MODULES = ("kills", "damages", "disks", "bad_input", "code")


class NotRunError(Exception):
    """The machine does not allow what a case needs; the message says what."""


@dataclass(frozen=True)
class Case:
    """A case of the campaign.

    Args:
        kind: The module's name, under which the table counts the case.
        name: Unique within the kind, and the same in each run; the id of the test.
        expected: What must happen, in a sentence; printed when it does not.
        check: Tries it in an empty folder of its own. Raises `AssertionError` when something else happens,
            and `NotRunError` where it cannot be tried.
        quick: Whether `make test` runs it too.
    """

    kind: str
    name: str
    expected: str
    check: Callable[[Path], None]
    quick: bool = False


def python() -> str:
    """What starts a Python process: the fork server's executable where one runs (the libraries are imported)."""
    return os.environ.get("TORTURE_PYTHON", sys.executable)


def all_cases(kinds: tuple[str, ...] = MODULES) -> Iterator[Case]:
    """The cases of each module's `cases()`, in their order."""
    for kind in kinds:
        yield from importlib.import_module(f"torture.{kind}").cases()
