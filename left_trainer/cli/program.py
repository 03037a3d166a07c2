"""How a program ends that is stopped, or that a disk or another run is in the way of: in one line."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable

from left_trainer.interrupts import INTERRUPTED, exiting_on_sigterm
from left_trainer.storage.errors import FULL, WriteFailedError
from left_trainer.storage.locks import FolderInUseError

BROKEN_PIPE = 141  # as a shell counts


def run_program(main: Callable[[], int | None]) -> int:
    """Run `main`, the whole of a command or a script; pass what is returned to `sys.exit`.

    Returns:
        What `main` returns, 0 for `None`; 130 after Ctrl-C (and 143 is exited with after SIGTERM); 1 where a file could
        not be written or another run uses the folder. Each with one line on stderr and no traceback.
    """
    logging.basicConfig(format="%(message)s", handlers=[_AboveBars()])  # unless the caller has set up its own
    with exiting_on_sigterm():
        try:
            code = main()
            sys.stdout.flush()
        except KeyboardInterrupt as stop:
            if not hasattr(stop, "is_told"):
                print("\nleft-trainer: interrupted.", file=sys.stderr)
            return INTERRUPTED
        except (WriteFailedError, FolderInUseError) as error:
            return _say(str(error))
        except BrokenPipeError:  # the reader of the output has ended, as `head` does
            _discard_output()
            return BROKEN_PIPE
        except OSError as error:
            if error.errno not in FULL:
                raise
            _discard_output()
            name = f"{error.filename!r}" if error.filename else "the output"
            return _say(f"{name} cannot be written because {FULL[error.errno]}: free space and start again.")
    return code or 0


class _AboveBars(logging.Handler):
    """Writes what is logged to stderr, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def _say(text: str) -> int:
    print(f"\nleft-trainer: error: {text}", file=sys.stderr)  # below a progress bar
    return 1


def _discard_output() -> None:
    """Let what is still to be written to stdout go nowhere, so that the interpreter does not fail to write it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
