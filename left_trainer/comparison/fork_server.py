"""A process that has imported everything and forks the runs of a comparison: `python -m ...fork_server SOCKET`.

It holds no model, no data and no thread of Python, and touches no GPU; what it forks is as if it had been started anew,
without the seconds that imports take. For each message on its socket it forks a keeper, which forks the run, waits for
it and answers with its exit code; where whoever asked is gone, the keeper kills the run.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import mmap
import os
import random
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from left_trainer.imports import without_collection

READY = b"ready"
MOST_BYTES = 1 << 20  # of a message
# Imported by a run when it first needs them, and by all runs sooner or later.
IMPORTED_LATER = ("left_trainer.evaluation.metrics", "matplotlib.pyplot")
# Open files that show that a library has made use of a GPU, which no fork survives.
GPU_FILES = ("nvidia-uvm", "/dev/kfd")
MADV_POPULATE_READ = 22  # of Linux 5.14
PAGE = mmap.PAGESIZE
Ranges = list[tuple[int, int]]


def main() -> int:
    """Import, say whether runs can be forked, and fork them until the socket is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, which is for the runs
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that keepers leave nothing behind
    control = socket.socket(fileno=int(sys.argv[1]))
    leave: list[int] = []
    atexit.register(_leave, leave)  # the first, so that it is called after all others
    with without_collection():
        from left_trainer.comparison import cell

        for name in IMPORTED_LATER:
            importlib.import_module(name)
    reason = why_not_forked()
    control.send(reason.encode() if reason else READY)
    if reason:
        return 1
    gc.collect()
    gc.freeze()
    pages = file_pages()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, MOST_BYTES, 2)
        if not message:
            return 0
        if os.fork() == 0:
            control.close()
            words = _keep(json.loads(message), *descriptors)
            populate(pages)
            random.seed()
            np.random.seed()
            code = cell.main([*words, cell.FORKED])
            leave.append(code)
            return code
        for descriptor in descriptors:
            os.close(descriptor)


def _leave(codes: Sequence[int]) -> None:
    """End a run that has said its exit code at once: taking all that was imported apart would last 0.3 s."""
    for code in codes:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def why_not_forked() -> str | None:
    """Why this process cannot be forked with what it has imported; `None` where it can."""
    if threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate() if thread is not threading.main_thread())
        return f"an import has started threads: {names}"
    opened = [str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    if any(file.endswith(GPU_FILES) for file in opened):
        return "an import has made use of a GPU"
    try:
        populate(file_pages()[:1])
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError) as error:  # an older or a confined system
        return f"the system cannot restore the pages of a process or wait for one: {error}"
    return None


def _keep(request: Mapping[str, Any], connection_fd: int, log_fd: int) -> list[str]:
    """Fork a run and see it to its end. Returns, in the run alone, the words of its command line."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for descriptor, standard in ((reads, 0), (log_fd, 1), (log_fd, 2)):
            os.dup2(descriptor, standard)
        for descriptor in (reads, writes, connection_fd, log_fd):
            os.close(descriptor)
        os.environ.update(request["environment"])
        os.chdir(request["cwd"])
        sys.path[0] = request["cwd"]  # as `python -m` has it
        return list(request["words"])
    os.close(reads)  # once `writes` is closed with this process, the run ends as well
    run = os.pidfd_open(pid)
    ended, _, _ = select.select([run, connection_fd], [], [])
    if run not in ended:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with socket.socket(fileno=connection_fd) as connection:
        code = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(OSError):  # nobody waits for it
            connection.send(str(code).encode())
    os._exit(0)


def file_pages() -> Ranges:
    """Address and bytes of what this process has in memory of the files that it maps, such as libraries.

    A fork has none of it in its resident memory until it touches it, so that its figures would depend on what was
    touched before.

    Raises:
        OSError: The system does not tell.
    """
    found: Ranges = []
    with Path("/proc/self/maps").open() as maps, Path("/proc/self/pagemap").open("rb") as pagemap:
        for line in maps:
            fields = line.split()
            if fields[4] == "0":  # no file
                continue
            start, end = (int(address, 16) for address in fields[0].split("-"))
            pagemap.seek(start // PAGE * 8)
            entries = np.frombuffer(pagemap.read((end - start) // PAGE * 8), np.uint64)
            found += [(start + first * PAGE, number * PAGE) for first, number in _runs(entries >> np.uint64(63))]
    return found


def _runs(flags: np.ndarray) -> Iterator[tuple[int, int]]:
    """First index and length of each run of ones."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield first, last - first


def populate(ranges: Ranges) -> None:
    """Have pages of files in memory, as `file_pages` found them. Raises `OSError` where the system cannot do that."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    for address, size in ranges:
        if madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), MADV_POPULATE_READ):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    sys.exit(main())
