"""Signals that end a program: exit codes, one line, and no traceback."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

# As a shell counts: 128 and the number of the signal.
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


def interrupted() -> KeyboardInterrupt:
    """Ctrl-C that a line on stderr has told of: a script that lets it through ends without a traceback.

    It is a plain `KeyboardInterrupt`, for which Python exits as for SIGINT itself; no subclass does that.
    """
    error = KeyboardInterrupt()
    error.is_told = True  # type: ignore[attr-defined]
    hook = sys.excepthook

    def without_traceback(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        if value is not error:
            hook(kind, value, trace)

    sys.excepthook = without_traceback
    return error


@contextlib.contextmanager
def exiting_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into one line and `SystemExit(143)`, so that what is open is closed. Main thread only."""

    def end(number: int, frame: FrameType | None) -> None:
        leave_to_default(number, owner)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        say("left-trainer: stopped by SIGTERM.\n")
        raise SystemExit(TERMINATED)

    owner = os.getpid()
    end.is_of_left_trainer = True  # type: ignore[attr-defined]
    with handling({signal.SIGTERM: end}):
        yield


@contextlib.contextmanager
def handling(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    """Handle signals inside, but for those that the program has a handler of its own for, or ignores.

    Python allows it in the main thread alone; in others this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in handlers}
    ours = {number: handler for number, handler in handlers.items() if _is_replaceable(before[number])}
    for number, handler in ours.items():
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def leave_to_default(number: int, owner: int) -> None:
    """In a process that was forked from the `owner` of a handler: do what would have been done without it.

    Such workers are ended by SIGTERM; of Ctrl-C they hear too, and what they work for has to go on until it is saved.
    """
    if os.getpid() != owner and number == signal.SIGTERM:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


def say(text: str) -> None:
    """Write to stderr from a signal handler, which may have interrupted another write."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), text.encode())


def _is_replaceable(handler: Any) -> bool:
    return handler in (signal.SIG_DFL, signal.default_int_handler) or hasattr(handler, "is_of_left_trainer")
