"""One try to run a cell: claim it, run it in a process of its own, and put what that left where others look for it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from left_trainer.comparison.cell import CELL_FILE, EXIT_WITH_PARENT, FAILURE_FILE, NOT_FORKED, Cell
from left_trainer.comparison.claims import CLAIM, Claim, Owner
from left_trainer.comparison.forked import ForkedProcess, ForkServer
from left_trainer.comparison.launcher import of_runs, program
from left_trainer.comparison.planned import why_not_here
from left_trainer.comparison.progress import LEAST_SECONDS, remove_progress
from left_trainer.comparison.results import finished_cell
from left_trainer.runs.json_records import write_json
from left_trainer.runs.report import REPORT_FILE
from left_trainer.secret_values import masked

Process = subprocess.Popen[bytes] | ForkedProcess
LOG_FILE = "log.txt"
NO_SERVER = "the engine starts each run anew"
# Beginnings of variables that the runs on other machines need as well.
HANDED_ON = ("HF_", "LEFT_TRAINER_", "TRANSFORMERS_", "WANDB_")


@dataclass(frozen=True)
class Attempt:
    """What an engine runs, here or on another machine that sees the same folder.

    Args:
        claim: To take. Where another process has it, nothing is run.
        cell: What to run.
        takeover_seconds: The silence after which others may take the cell over from this process.
        working_dir: Of the process, where paths of its arguments begin; by default that of this one.
        checks_memory: Leave the cell out where it does not fit on the machine that runs it.
    """

    claim: Claim
    cell: Cell
    takeover_seconds: float
    working_dir: str | None = None
    checks_memory: bool = False

    def run(
        self,
        environment: Mapping[str, str] | None = None,
        stopped: threading.Event | None = None,
        fork_server: ForkServer | None = None,
    ) -> None:
        """Run the cell from its beginning to its end.

        Args:
            environment: Variables that the process of the cell has beside those of this one.
            stopped: Once it is set, the process is killed and the claim given back.
            fork_server: Forks the process, where it can and the cell has no launcher.

        Raises:
            WriteFailedError: The disk is full, read-only or gone.
        """
        stopped = stopped or threading.Event()
        owner = None if stopped.is_set() else self.claim.take(self.takeover_seconds)
        if owner is None:
            return
        try:
            if finished_cell(self.claim.cell_folder) is None:  # by another process, since the claim was found free
                self._run(owner, environment or {}, stopped, fork_server or ForkServer({}, NO_SERVER))
        finally:
            self.claim.release()

    def _run(
        self, owner: Owner, environment: Mapping[str, str], stopped: threading.Event, fork_server: ForkServer
    ) -> None:
        folder = self.claim.run_folder
        self.cell.write(folder)
        if self.checks_memory and (reason := why_not_here(self.cell, self.claim.cell_folder.parent.parent)):
            write_json(folder / FAILURE_FILE, {"reason": reason})
        else:
            with self._start(environment, fork_server) as process:
                return_code = self._wait(process, owner, stopped)
            if return_code is None or not self.claim.beat():
                return
            if finished_cell(folder) is None:
                write_json(folder / FAILURE_FILE, {"reason": _reason(return_code, self.claim.cell_folder / LOG_FILE)})
        publish(folder, self.claim.cell_folder)

    def _start(self, environment: Mapping[str, str], fork_server: ForkServer) -> Process:
        cell_folder = self.claim.cell_folder.absolute()
        run_folder = Claim(cell_folder, self.claim.number).run_folder
        words = [str(run_folder), str(cell_folder.parent), EXIT_WITH_PARENT]
        cwd = self.working_dir or str(Path.cwd())
        with (cell_folder / LOG_FILE).open("wb") as log:
            if self.cell.launcher is None:
                process = fork_server.start(words, log, environment, cwd)
                if process is not None:
                    return process
            reason = "its launcher starts it" if self.cell.launcher else str(fork_server.reason)
            command = [*program(self.cell.launcher), "-m", "left_trainer.comparison.cell", *words, NOT_FORKED, reason]
            variables = {**of_runs(), **environment}
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=variables, cwd=cwd)

    def _wait(self, process: Process, owner: Owner, stopped: threading.Event) -> int | None:
        """Wait for a process to end, and show meanwhile that this one lives.

        Returns:
            Its exit code; `None` where it was killed, as this process is to stop or has lost the cell to another one.
        """
        beat_at = time.monotonic()
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=min(LEAST_SECONDS, owner.beat_seconds))
                now = time.monotonic()
                if stopped.is_set() or (now - beat_at >= owner.beat_seconds and not self.claim.beat()):
                    return None
                beat_at = now if now - beat_at >= owner.beat_seconds else beat_at
        finally:
            process.kill()


def handed_on() -> dict[str, str]:
    """The variables of this process that a run on another machine needs, a token of the hub among them."""
    return {name: value for name, value in os.environ.items() if name.startswith(HANDED_ON)}


def publish(folder: Path, cell_folder: Path) -> None:
    """Move what a run left into the cell's folder, in place of what was there; the result last."""
    remove_progress(folder)
    for old in cell_folder.iterdir():
        if old.name not in (CELL_FILE, LOG_FILE) and not old.name.startswith(CLAIM):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    for new in sorted(folder.iterdir(), key=lambda path: path.name in (REPORT_FILE, FAILURE_FILE)):
        new.replace(cell_folder / new.name)


def _reason(return_code: int, log: Path) -> str:
    """Why a process ended without a word of its own."""
    if return_code < 0:
        name = signal.Signals(-return_code).name
        hint = " (often: the machine's memory was used up)" if name == "SIGKILL" else ""
        return f"The process was killed by {name}{hint}."
    lines = log.read_text(encoding="utf-8", errors="replace").strip().split("\n")
    return f"The process ended with exit code {return_code}: {masked(lines[-1].strip()) or 'it printed nothing'}"
