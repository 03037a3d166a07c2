"""Errors in the user's input, shown as one paragraph."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from left_trainer.secret_values import masked
from left_trainer.shown_text import printable

USER_ERRORS = (ValueError, TypeError, OSError, ImportError)
TRACEBACK_VARIABLE = "LEFT_TRAINER_TRACEBACK"
PACKAGE = Path(__file__).parent.parent


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn an error raised inside into a paragraph on stderr and exit code 2.

    Used for the part of a command or a script that reads and checks input. Errors after that keep their traceback, and
    so do errors of other types, which no check raises. With the environment variable `LEFT_TRAINER_TRACEBACK=1` every
    error keeps it.
    """
    try:
        yield
    except USER_ERRORS as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(printable(masked(f"left-trainer: error: {paragraph(error)}")), file=sys.stderr)
        raise SystemExit(2) from None


def paragraph(error: BaseException) -> str:
    """What an error says, without blank lines; for one that no check of ours has raised, how to see its origin."""
    text = re.sub(r"\s*\n\s*\n\s*", "\n", str(error).strip()) or type(error).__name__
    if _is_ours(error):
        return text
    return f"{text} ({type(error).__name__} of a library; {TRACEBACK_VARIABLE}=1 shows where it comes from.)"


def _is_ours(error: BaseException) -> bool:
    """Whether the innermost frame of the traceback is in this package."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(PACKAGE)
