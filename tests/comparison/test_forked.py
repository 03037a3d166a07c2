"""Processes that are forked from one with all imports: what they return, how they end, and when there are none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from left_trainer.cli.main import main
from left_trainer.comparison import fork_server, forked
from left_trainer.comparison.cell import CELL_FILE, EXIT_WITH_PARENT, FAILURE_FILE, Cell
from left_trainer.comparison.engines import make_engine
from left_trainer.comparison.forked import ForkedProcess, ForkServer
from processes import ENVIRONMENT, PATHS
from run_results import make_result

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are of Linux")
# Stands in the place of a run, which would take seconds: it says who it is, and then fails or waits.
PLUGIN = """
import atexit, json, os, sys, threading, time
from pathlib import Path
import psutil
atexit.register(lambda: Path("left").write_text(""))
sys.stdout.write("not flushed")
rss = psutil.Process().memory_info().rss
state = {"pid": os.getpid(), "rss": rss, "cwd": os.getcwd(), "own": os.environ.get("OWN"), "import": sys.path[0]}
path = Path("state.json")
path.with_suffix(".part").write_text(json.dumps(state))
path.with_suffix(".part").rename(path)
if Path("wait").exists():
    time.sleep(600)
threading.Thread(target=lambda: (time.sleep(0.2), Path("finished").write_text(""))).start()
raise ValueError("this is no run")
"""
# Half of a file is touched.
PAGES = """
import mmap, os
import psutil
from left_trainer.comparison.fork_server import file_pages, populate
def resident():
    print(psutil.Process().memory_info().rss, flush=True)
with open("file", "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0)
sum(mapped[page * mmap.PAGESIZE] for page in range(len(mapped) // mmap.PAGESIZE // 2))
pages = file_pages()
resident()
if os.fork() == 0:
    resident()
    populate(pages)
    resident()
    os._exit(0)
os.wait()
"""


@pytest.fixture(scope="module")
def server(python):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", python)
        server = ForkServer(ENVIRONMENT)
    yield server
    server.close()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A cell that its plugin ends."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN)
    cell = make_result().cell
    content = {**cell.__dict__, "plugins": (str(plugin),)}
    Cell(**content).write(tmp_path)
    assert (tmp_path / CELL_FILE).is_file()
    return tmp_path


def start(server: ForkServer, folder: Path, **environment: str) -> ForkedProcess | None:
    with (folder / "log.txt").open("wb") as log:
        return server.start([str(folder), str(folder), EXIT_WITH_PARENT], log, environment, str(folder))


def state(folder: Path) -> dict:
    until = time.monotonic() + 60
    while not (folder / "state.json").is_file() and time.monotonic() < until:
        time.sleep(0.02)
    return json.loads((folder / "state.json").read_text())


def end_of(pid: int) -> None:
    until = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "it runs on"
        time.sleep(0.02)


def test_a_forked_run_has_folder_environment_log_and_exit_code_of_its_own(server, folder, tmp_path_factory):
    with start(server, folder, OWN="value") as run:
        assert run.wait() == 1
    assert "ValueError: this is no run" in (folder / "log.txt").read_text()
    assert "this is no run" in json.loads((folder / FAILURE_FILE).read_text())["reason"]
    seen = state(folder)
    assert (seen["cwd"], seen["own"], seen["import"]) == (str(folder), "value", str(folder))
    assert "not flushed" in (folder / "log.txt").read_text()  # it ends at once, and still in order
    assert (folder / "left").exists()
    assert (folder / "finished").exists()
    other = tmp_path_factory.mktemp("other")
    with start(server, other) as run:  # without a cell
        assert run.wait() == 1
    assert "cell.json" in json.loads((other / FAILURE_FILE).read_text())["reason"]


def test_a_forked_process_has_the_pages_of_files_that_the_first_one_had(tmp_path):
    """Else what it touches later, of libraries that are in memory, would count as its own."""
    (tmp_path / "file").write_bytes(bytes(64 << 20))
    result = subprocess.run(
        [sys.executable, "-c", PAGES], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    first, forked, filled = map(int, result.stdout.split())
    assert forked < first - (30 << 20)
    assert filled == pytest.approx(first, abs=4 << 20)


def test_a_run_is_killed_and_ends_with_whoever_waits_for_it(server, folder):
    (folder / "wait").touch()
    with start(server, folder) as run:
        pid = state(folder)["pid"]
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(timeout=0.01)
        run.kill()
        assert run.wait() == -signal.SIGKILL
        run.kill()  # does nothing
    end_of(pid)
    (folder / "state.json").unlink()
    run = start(server, folder)
    pid = state(folder)["pid"]
    run._connection.close()  # as the end of this process does
    end_of(pid)
    (folder / "state.json").unlink()
    with start(server, folder) as run:
        pid = state(folder)["pid"]
        psutil.Process(pid).parent().kill()
        assert run.wait() == -signal.SIGKILL
    end_of(pid)


def test_a_server_that_is_gone_leaves_runs_alone_and_starts_none(python, folder, monkeypatch):
    monkeypatch.setattr(sys, "executable", python)
    server = ForkServer(ENVIRONMENT)
    (folder / "wait").touch()
    with start(server, folder) as run:
        pid = state(folder)["pid"]
        psutil.Process(pid).parent().parent().kill()
        server._process.wait()
        assert start(server, folder) is None
        assert "the process that forks them is gone" in server.reason
        assert psutil.pid_exists(pid)
        run.kill()
        assert run.wait() == -signal.SIGKILL
    server.close()
    server.close()


def test_a_server_that_cannot_import_says_so(folder):
    server = ForkServer({**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(["/nowhere", *PATHS]), "PYTHONHOME": "/nowhere"})
    assert start(server, folder) is None
    assert server.reason == "the process that forks them has ended"


def test_what_does_not_survive_a_fork_is_not_forked(monkeypatch):
    def opened(name: str) -> None:
        monkeypatch.setattr(fork_server, "GPU_FILES", (name,))

    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="of-a-library")
    thread.start()
    assert "of-a-library" in fork_server.why_not_forked()
    stop.set()
    thread.join()
    monkeypatch.setattr(threading, "active_count", lambda: 1)  # the test runner may have threads
    assert fork_server.why_not_forked() is None
    with Path(os.devnull).open():
        opened("/null")
        assert "GPU" in fork_server.why_not_forked()
    opened("/no-such-file")

    def fail(ranges):
        raise OSError("as before Linux 5.14")

    with monkeypatch.context() as patch:
        patch.setattr(fork_server, "populate", fail)
        assert "5.14" in fork_server.why_not_forked()
    monkeypatch.delattr(fork_server.os, "pidfd_open")
    assert "pidfd_open" in fork_server.why_not_forked()


def test_fork_is_an_option_of_the_local_engine(tmp_path):
    with make_engine("local", None, {"fork": False}, tmp_path) as engine:
        assert engine._fork_server.reason == "fork=False"
    with pytest.raises(ValueError, match="fork='no' must be true or false"):
        make_engine("local", None, {"fork": "no"}, tmp_path)


def test_what_is_refused_leaves_no_process(tmp_path, capsys, monkeypatch):
    ended = []
    end = forked._end

    def noted(process, control):
        end(process, control)
        ended.append(process.returncode)

    monkeypatch.setattr(forked, "_end", noted)
    with pytest.raises(SystemExit) as exit_info:
        main(["compare", "--output_dir", str(tmp_path / "out"), "--methods", "no-such-method"])
    assert exit_info.value.code == 2
    assert ended == [-signal.SIGKILL]
