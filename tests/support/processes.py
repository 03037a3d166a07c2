"""Processes of their own, for what has to be tested from outside."""

from __future__ import annotations

import os
import socket
import subprocess

from places import REPOSITORY, SUPPORT

# A child imports the package of this checkout and the modules beside this one, and leaves the other cores alone.
PATHS = (str(REPOSITORY), str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")]))
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join(PATHS),
}


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that was started with `stdout=PIPE`, and wait until it is gone.

    What starts a process for the fixture `python` may be gone before it; the pipe ends when both are.
    """
    process.kill()
    process.stdout.read()
    process.wait()


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
