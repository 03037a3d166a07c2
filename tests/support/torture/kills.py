"""Kills and signals at file operations and steps of a run: the same script, started again, reaches the same end."""

from __future__ import annotations

import functools
import json
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from processes import ENVIRONMENT
from torture.case import Case, python

METHODS = ("lora", "p_tuning", "adalora", "pissa", "full")
FAMILIES = ("encoder_decoder", "decoder_only")
KILLS = 12  # at file operations of a training, spread evenly from its first to its last
STEPS = (1, 4)  # at whose ends signals arrive
EXIT_STATUS = {"SIGKILL": (-9, 137), "SIGTERM": (-15, 143), "SIGINT": (-2, 130)}
VICTIM = str(Path(__file__).with_name("victim.py"))
QUICK = {
    "train lora decoder_only at 3/12",
    "train p_tuning encoder_decoder at 11/12",
    "train lora decoder_only SIGTERM 4",
}
GOES_ON = "the process dies; started again it ends with the losses and weights of a run that was not killed"
WHOLE_OR_ABSENT = "the process dies; the result is whole or absent, and the command, given again, gives the same files"
TRAINED = {"max_train_samples": "8", "max_eval_samples": "4", "max_steps": "2"}
_lock = threading.Lock()


def cases() -> Iterator[Case]:
    for method in METHODS:
        for family in FAMILIES:
            for part in range(KILLS):
                yield _case(
                    f"train {method} {family} at {part}/{KILLS}", GOES_ON, _killed(method, family, [part / KILLS])
                )
            for name in ("SIGTERM", "SIGINT"):
                for step in STEPS:
                    check = _signalled(method, family, name, step)
                    yield _case(f"train {method} {family} {name} {step}", GOES_ON, check)
        yield _case(f"train {method} twice", GOES_ON, _killed(method, "decoder_only", [0.5, 0.6]))
        yield _case(f"train {method} late", GOES_ON, _killed(method, "encoder_decoder", [0.97, 0.2]))
    for delay in (0.0005, 0.002, 0.005, 0.01, 0.05):  # inside of writes that Python does not see
        for method in ("lora", "p_tuning"):
            check = _killed(method, "decoder_only", [0.4], delay=delay)
            yield _case(f"train {method} decoder_only {delay} s after an operation", GOES_ON, check)
    for method in ("lora", "full"):
        for part in (0.2, 0.5, 0.9):
            yield _case(
                f"train {method} two processes at {part}", GOES_ON, _killed(method, "decoder_only", [part], processes=2)
            )
    for part in (0, 0.3, 0.6, 0.8, 0.95):
        yield _case(f"merge at {part}", WHOLE_OR_ABSENT, _command_killed("merge", part))
    for part in (0, 0.25, 0.5, 0.75, 0.95):
        yield _case(f"report at {part}", WHOLE_OR_ABSENT, _command_killed("report", part))
    for part in (0.1, 0.3, 0.5, 0.7, 0.9):
        yield _case(f"compare at {part}", WHOLE_OR_ABSENT, _command_killed("compare", part))


def _case(name: str, expected: str, check: Callable[[Path], None]) -> Case:
    return Case("kills", name, expected, check, name in QUICK)


# Trainings


def _killed(
    method: str, family: str, parts: list[float], delay: float = 0.0, processes: int = 1
) -> Callable[[Path], None]:
    """Killed once for each of `parts` of the operations of a whole run, started again each time."""

    def check(folder: Path) -> None:
        whole = _whole_run(method, family, processes)
        options = _training(folder, method, family)
        for part in parts:
            at = round(part * (whole["operations"] - 1))
            status, text = _start({**options, "kill_at": at, "signal": "SIGKILL", "delay": delay}, processes)
            # A run that goes on from a checkpoint has fewer operations than a whole one, and may end before.
            assert status in (*EXIT_STATUS["SIGKILL"], 0, 1 if processes > 1 else 0), f"exit {status}: {text}"
        _assert_same_end(options, whole, processes)

    return check


def _signalled(method: str, family: str, name: str, step: int) -> Callable[[Path], None]:
    """`name` arrives at the end of `step`."""

    def check(folder: Path) -> None:
        whole = _whole_run(method, family, 1)
        options = _training(folder, method, family)
        status, text = _start({**options, "signal_at_step": step, "signal": name})
        assert status in EXIT_STATUS[name], f"exit {status}: {text}"
        _assert_same_end(options, whole)

    return check


def _assert_same_end(options: dict[str, Any], whole: dict[str, Any], processes: int = 1) -> None:
    status, text = _start(options, processes)
    assert status == 0, f"exit {status} when started again: {text}"
    result = json.loads(Path(options["result"]).read_text())
    assert _differ(result["losses"], whole["losses"]) is None, f"losses {result['losses']}, not {whole['losses']}"
    assert result["weights"].keys() == whole["weights"].keys()
    wrong = _differ(list(result["weights"].values()), list(whole["weights"].values()))
    assert wrong is None, f"weights differ: {wrong}"
    leftovers = [
        path.name for path in (Path(options["folder"]) / "run").iterdir() if path.name.endswith((".tmp", ".old"))
    ]
    assert not leftovers, f"leftovers of killed saves: {leftovers}"


def _differ(found: list[float], expected: list[float]) -> str | None:
    if len(found) != len(expected):
        return f"{len(found)} values, not {len(expected)}"
    wrong = [(a, b) for a, b in zip(found, expected, strict=True) if abs(a - b) > 1e-6 * max(1, abs(b))]
    return str(wrong[0]) if wrong else None


def _whole_run(method: str, family: str, processes: int) -> dict[str, Any]:
    """Losses, weights and operations of a training that nothing disturbs."""
    with _lock:
        return _record_run(method, family, processes)


@functools.cache
def _record_run(method: str, family: str, processes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="torture-whole-") as name:
        folder = Path(name)
        options = {**_training(folder, method, family), "count": str(folder / "count")}
        status, text = _start(options, processes)
        assert status == 0, f"a run that nothing disturbs ended with exit {status}: {text}"
        operations = int((folder / "count").read_text())
        return {**json.loads(Path(options["result"]).read_text()), "operations": operations}


def _training(folder: Path, method: str, family: str) -> dict[str, Any]:
    work = folder / "work"
    work.mkdir(exist_ok=True)
    return {"folder": str(work), "result": str(folder / "result.json"), "method": method, "family": family}


def _start(options: dict[str, Any], processes: int = 1) -> tuple[int, str]:
    """Exit status of the victim, and the end of what it printed."""
    command = [python(), VICTIM, json.dumps(options)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [python(), *launcher, *command[1:]]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, (done.stdout + done.stderr)[-1500:]


# Command lines


def _command_killed(name: str, part: float) -> Callable[[Path], None]:
    """A command that writes a result, killed at a part of its operations and given again."""

    def check(folder: Path) -> None:
        with _lock:
            whole_count, whole_files = _whole_command(name)
        work = folder / "work"
        work.mkdir()
        options = {"folder": str(work), "command": _command(name, work), "signal": "SIGKILL"}
        status, text = _start({**options, "kill_at": round(part * (whole_count - 1))})
        assert status in EXIT_STATUS["SIGKILL"], f"exit {status}: {text}"
        if name == "merge" and (work / "out").exists():
            assert _files(work / "out") == whole_files, "half a model was left"
            return
        status, text = _start(options)
        assert status == 0, f"exit {status} when given again: {text}"
        assert _files(work / "out") == whole_files, f"{_files(work / 'out')}, not {whole_files}"

    return check


@functools.cache
def _whole_command(name: str) -> tuple[int, set[str]]:
    """Operations of a command that nothing disturbs, and the files it leaves."""
    with tempfile.TemporaryDirectory(prefix="torture-whole-") as folder:
        work = Path(folder) / "work"
        work.mkdir()
        count = Path(folder) / "count"
        status, text = _start({"folder": str(work), "command": _command(name, work), "count": str(count)})
        assert status == 0, f"a command that nothing disturbs ended with exit {status}: {text}"
        return int(count.read_text()), _files(work / "out")


def _files(folder: Path) -> set[str]:
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not Path(name).name.startswith("events.")}


def _command(name: str, work: Path) -> list[str]:
    out = str(work / "out")
    if name == "merge":
        return ["merge", "--adapter", str(_adapter()), "--output_dir", out]
    if name == "report":
        return ["report", str(_compared()), "--output_dir", out]
    return [*_comparison(), "--output_dir", out]


@functools.cache
def _adapter() -> Path:
    """A trained adapter, made once for the process."""
    folder = Path(tempfile.mkdtemp(prefix="torture-adapter-"))
    flags = [word for key, value in TRAINED.items() for word in (f"--{key}", value)]
    command = ["train", "--task", "summarization", *flags, "--output_dir", str(folder / "run"), "--save_strategy", "no"]
    status, text = _start({"folder": str(folder / "none"), "command": command})
    assert status == 0, text
    return folder / "run"


def _comparison() -> list[str]:
    sizes = [word for key, value in TRAINED.items() for word in (f"--{key}", value)]
    return ["compare", "--methods", "lora", "--tasks", "classification", *sizes]


@functools.cache
def _compared() -> Path:
    """A finished comparison, made once for the process."""
    folder = Path(tempfile.mkdtemp(prefix="torture-compared-"))
    status, text = _start(
        {"folder": str(folder / "none"), "command": [*_comparison(), "--output_dir", str(folder / "out")]}
    )
    assert status == 0, text
    return folder / "out"
