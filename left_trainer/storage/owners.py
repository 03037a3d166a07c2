"""Which process made a hidden file, and whether it still runs."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import socket
import time
from pathlib import Path

import psutil

TOKEN = re.compile(r"(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)")
# A process of another machine cannot be asked; what it has not touched for this long is abandoned.
MAX_SILENCE_SECONDS = 3600
# Start times are computed from the clock, which may be set.
MAX_CLOCK_CHANGE_SECONDS = 5


def token() -> str:
    """Names this process: its machine, its number, and when it started, as numbers are used again."""
    pid = os.getpid()
    return f"{_host()}-{pid}-{int(psutil.Process(pid).create_time())}"


def is_alive(owner: str, path: Path) -> bool:
    """Whether the process that `owner`, a token, names may still be writing `path`."""
    match = TOKEN.fullmatch(owner)
    if match is not None and match["host"] != _host():
        return time.time() - _last_change(path) < MAX_SILENCE_SECONDS
    return not has_ended(owner)


def has_ended(owner: str) -> bool:
    """Whether the process that `owner`, a token, names is known to be gone; of other machines nothing is known."""
    match = TOKEN.fullmatch(owner)
    if match is None or match["host"] != _host():
        return False
    try:
        started = psutil.Process(int(match["pid"])).create_time()
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
    return abs(started - int(match["start"])) > MAX_CLOCK_CHANGE_SECONDS


@functools.cache
def _host() -> str:
    """Of the machine, and of the container, in which process numbers count anew."""
    try:
        container = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        container = 0
    return hashlib.sha256(f"{socket.gethostname()} {container}".encode()).hexdigest()[:8]


def _last_change(path: Path) -> float:
    try:
        return max(part.lstat().st_mtime for part in (path, *path.rglob("*")))
    except OSError:
        return time.time()
