"""A Python that starts at once: a server imports the libraries and forks a process for every one that is asked for.

Importing torch, transformers, PEFT and TRL takes seconds, and tests start some hundred processes. `start_server`
returns the path of an executable that takes the place of `python` on a command line: a script, module or code runs as
`__main__` in a process of its own, with the arguments, environment, folder and open files it was started with, and the
executable ends as that process does. What it starts with `sys.executable` comes from the server too. `left_trainer`
itself is imported anew by each.

What a process would read from the environment while it imports a library is the server's. Sets and dictionaries of
strings are hashed as in the server, so what must not depend on that needs a fresh process.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIBRARIES = (
    "accelerate.commands.launch",
    "bitsandbytes",
    "datasets",
    "evaluate",
    "matplotlib.pyplot",
    "peft",
    "peft.optimizers",
    "rouge_score.rouge_scorer",
    "sacrebleu",
    "torch.distributed.run",
    "torch.profiler",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.t5.modeling_t5",
    "transformers.trainer_seq2seq",
    "trl.scripts.utils",
    "trl.trainer.sft_trainer",
)
MAX_OPEN_FILES = 64


def start_server(folder: Path, environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], Path]:
    """The server, which ends when its standard input is closed, and the executable. Does not wait for the imports."""
    address, executable = folder / "socket", folder / "python"
    # Isolated and without site, because what only passes a request on should take milliseconds.
    executable.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{__file__}" ask "{address}" "$@"\n')
    executable.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(64)
        server = subprocess.Popen(
            [sys.executable, __file__, "serve", str(listener.fileno()), str(executable)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=environment,
            pass_fds=[listener.fileno()],
        )
    return server, executable


def serve(listener: socket.socket, executable: str) -> None:
    """Fork for every connection until standard input ends. Returns in each forked process that has something to run."""
    import gc
    import importlib
    from multiprocessing import spawn

    for library in LIBRARIES:
        importlib.import_module(library)
    # A lock that another thread holds stays locked in a forked process. The allocator of Arrow takes care of its own.
    threads = [(thread / "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
    assert len(threads) - threads.count("jemalloc_bg_thd") == 1, threads
    gc.collect()
    gc.freeze()
    sys.executable = executable
    spawn.set_executable(executable)
    keepers = set()
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        # Waited for, the time that they took counts as time of the tests.
        keepers = {keeper for keeper in keepers if os.waitpid(keeper, os.WNOHANG) == (0, 0)}
        if sys.stdin in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if keeper := os.fork():
            keepers.add(keeper)
            connection.close()
            continue
        listener.close()
        with connection:
            request, files = receive(connection)
            child = os.fork()
            if child:
                keep(child, connection, files)
        become(request, files)
        return


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    message, files, _, _ = socket.recv_fds(connection, 1 << 16, MAX_OPEN_FILES)
    while part := connection.recv(1 << 16):
        message += part
    return json.loads(message), files


def keep(child: int, connection: socket.socket, files: list[int]) -> None:
    """Report how `child` ends; kill it if the one that asked for it is killed. Does not return."""
    for file in files:
        os.close(file)
    ended = os.pidfd_open(child)
    events = select.poll()
    events.register(ended, select.POLLIN)
    events.register(connection, 0)  # a hang-up alone
    if ended not in dict(events.poll()):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    try:
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    finally:
        os._exit(0)


def become(request: dict[str, Any], files: list[int]) -> None:
    """Take on what the process was started with."""
    import fcntl
    import random

    import numpy as np

    numbers = request["files"]
    out_of_the_way = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, max(numbers) + 1) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(out_of_the_way, numbers, strict=True):
        os.dup2(file, number, inheritable=number < 3)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    random.seed()
    np.random.seed()
    sys.argv[:] = request["arguments"]


def run_as_main() -> None:
    """Run `-c CODE`, `-m MODULE` or a script with its arguments, as `python` does."""
    import itertools
    import runpy

    options = itertools.takewhile(lambda argument: argument[0] == "-" and argument not in ("-c", "-m"), sys.argv)
    kind, *rest = sys.argv[len(list(options)) :]  # such as -B and -u, which multiprocessing and torchrun pass on
    sys.argv[:] = [kind, *rest]
    if kind == "-c":
        sys.argv[:], sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
    elif kind == "-m":
        sys.argv[:], sys.path[0] = rest, str(Path.cwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(kind).resolve().parent)
        runpy.run_path(str(Path(kind).absolute()), run_name="__main__")


def exit_code_of(function: Callable[[], None]) -> int:
    """What `python` exits with, and prints, when `function` is all that it runs."""
    try:
        function()
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def end(code: int) -> None:
    """Leave without taking the libraries apart, which takes half a second; as processes of multiprocessing do."""
    import atexit
    import threading

    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


def ask(address: str, arguments: list[str]) -> int:
    """Have a process run with the files that are open here. Returns its exit code, negative for a signal."""
    numbers = [int(name) for name in os.listdir("/dev/fd")]  # noqa: PTH208
    numbers = [number for number in sorted(numbers) if os.path.exists(f"/dev/fd/{number}")]  # noqa: PTH110
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ), "files": numbers}  # noqa: PTH109
    message = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        sent = socket.send_fds(connection, [message], numbers)
        connection.sendall(message[sent:])
        connection.shutdown(socket.SHUT_WR)
        os.closerange(3, connection.fileno())
        return int(connection.recv(16))


def main() -> None:
    if sys.argv[1] == "serve":
        serve(socket.socket(fileno=int(sys.argv[2])), sys.argv[3])
        end(exit_code_of(run_as_main))
    code = ask(sys.argv[2], sys.argv[3:])
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
