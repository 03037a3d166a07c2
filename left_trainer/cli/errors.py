"""Errors in the user's input, shown as one paragraph."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from left_trainer.secret_values import masked
from left_trainer.shown_text import printable

USER_ERRORS = (ValueError, TypeError, OSError)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn an error raised inside into a paragraph on stderr and exit code 2.

    Used for the part of a command that reads and checks input. Errors after that keep their traceback.
    """
    try:
        yield
    except USER_ERRORS as error:
        print(printable(masked(f"left-trainer: error: {error}")), file=sys.stderr)
        raise SystemExit(2) from None
