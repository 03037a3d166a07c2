"""Runs that are forked from a process that has imported everything; see `fork_server.py`."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from left_trainer.comparison.fork_server import MOST_BYTES, READY


class ForkedProcess:
    """A forked run, with what is used of `subprocess.Popen`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.returncode: int | None = None

    def __enter__(self) -> ForkedProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self.wait()
        self._connection.close()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or the negated number of the signal that ended the run.

        Raises:
            subprocess.TimeoutExpired: It runs on.
        """
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                answer = self._connection.recv(MOST_BYTES)
            except TimeoutError:
                raise subprocess.TimeoutExpired("a forked run", timeout or 0) from None
            except ConnectionError:
                answer = b""
            self.returncode = int(answer) if answer else -signal.SIGKILL  # its keeper was killed, and it ends as well
        return self.returncode

    def kill(self) -> None:
        """Have the run killed; does nothing where it has ended."""
        if self.returncode is None:
            self._connection.shutdown(socket.SHUT_WR)


class ForkServer:
    """The process that runs are forked from. It imports while this one does something else.

    Where it cannot be used, `reason` says why, and `start` returns `None`. `close` ends it, as does the end of this
    process or of the object; what it forked goes on.

    Args:
        environment: Its variables.
        reason: Why runs are not to be forked at all.
    """

    def __init__(self, environment: Mapping[str, str], reason: str | None = None) -> None:
        self.reason = reason or (None if sys.platform == "linux" else "only on Linux can such a process be forked")
        self._lock = threading.Lock()
        self._is_ready = False
        self.close: Callable[[], object] = lambda: None
        if self.reason is not None:
            return
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "left_trainer.comparison.fork_server", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                pass_fds=[theirs.fileno()],
            )
        self.close = weakref.finalize(self, _end, self._process, self._control)

    def start(
        self, words: Sequence[str], log: IO[bytes], environment: Mapping[str, str], cwd: str
    ) -> ForkedProcess | None:
        """Fork a run.

        Args:
            words: Of its command line.
            log: That it writes to.
            environment: Variables that this one has beside those of all runs.
            cwd: Folder that it starts in.
        """
        with self._lock:
            if self.reason is None and not self._is_ready:
                self._wait_until_ready()
            if self.reason is not None:
                return None
            message = {"words": list(words), "environment": dict(environment), "cwd": cwd}
            ours, theirs = socket.socketpair()
            try:
                with theirs:
                    socket.send_fds(self._control, [json.dumps(message).encode()], [theirs.fileno(), log.fileno()])
            except OSError as error:
                self.reason = f"the process that forks them is gone: {error}"
                ours.close()
                return None
            return ForkedProcess(ours)

    def _wait_until_ready(self) -> None:
        try:
            answer = self._control.recv(MOST_BYTES)
        except OSError:
            answer = b""
        self._is_ready = answer == READY
        if not self._is_ready:
            self.reason = answer.decode() or "the process that forks them has ended"


def _end(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    process.kill()
    process.wait()
    control.close()
