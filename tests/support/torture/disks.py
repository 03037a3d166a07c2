"""Full, read-only and vanished disks: one sentence, and the earlier state stays.

A disk is a small tmpfs, which root may mount. A full one has a part of the room that the command takes, so that it
fills at another file in each case.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from processes import ENVIRONMENT
from torture.case import Case, NotRunError, python

VICTIM = str(Path(__file__).with_name("disk_victim.py"))
SIZE_BYTES = 64 * 2**20
SHARES = (0.0, 0.15, 0.4, 0.7, 0.9)  # of the room that is needed
FEW = (0.0, 0.5, 0.9)
TRAININGS = (("lora", "decoder_only"), ("p_tuning", "encoder_decoder"), ("full", "decoder_only"))
SAYS = "the command ends with one sentence that names the path and the reason; "
STAYS = "what was there is byte for byte as it was; with room, the same command reaches the same end"
SMALL = ("--max_train_samples", "8", "--max_eval_samples", "4", "--max_steps", "2")
QUICK = {"full checkpoint lora 0.4", "full merge 0.5", "read-only report"}
_lock = threading.RLock()


def cases() -> Iterator[Case]:
    for method, family in TRAININGS:
        for share in SHARES:
            yield _case(f"full checkpoint {method} {share}", _full_checkpoint(method, family, share))
    for method, family in TRAININGS[::2]:
        for share in FEW:
            yield _case(f"full final save {method} {share}", _full_final_save(method, family, share))
    for share in FEW:
        yield _case(f"full adapter saver {share}", _full_checkpoint("lora", "encoder_decoder", share, adapters=True))
    for name in COMMANDS:
        for share in SHARES if name != "compare" else FEW:
            yield _case(f"full {name} {share}", _full_command(name, share))
        yield _case(f"read-only {name}", _read_only(name))
    yield _case("full output of generate", _full_output)
    for method, family in TRAININGS:
        yield _case(f"read-only at a step {method}", _read_only_at_step(method, family))
        yield _case(f"a file in place of the folder {method}", _replaced_by_a_file(method, family))
        yield _case(f"vanished folder {method}", _vanished(method, family), "the folder is made again and the run ends")


def _case(name: str, check: Callable[[Path], None], expected: str = SAYS + STAYS) -> Case:
    return Case("disks", name, expected, check, name in QUICK)


# Trainings


def _full_checkpoint(method: str, family: str, share: float, adapters: bool = False) -> Callable[[Path], None]:
    """A run that was stopped after its second step goes on where there is too little room for it."""

    def check(folder: Path) -> None:
        whole = _whole_training(method, family, adapters)
        with _disk(folder) as disk:
            options = {**_options(disk, folder, method, family), "adapters": adapters}
            status, text = _victim({**options, "at_step": [2, []]})
            assert status in (143, -15), f"exit {status}: {text}"
            earlier, taken = _files(disk), _used(disk)
            with _filled(disk, share * (whole["room"] - taken)):
                _assert_says(*_victim(options), disk / "run")
                _assert_stays(disk, earlier)
            status, text = _victim(options)
            assert status == 0, f"exit {status} with room: {text}"
            losses = json.loads(Path(options["result"]).read_text())
            assert losses == whole["losses"], f"losses {losses}, not {whole['losses']}"

    return check


def _full_final_save(method: str, family: str, share: float) -> Callable[[Path], None]:
    """A second run into the folder of a first, for whose result there is too little room."""

    def check(folder: Path) -> None:
        with _disk(folder) as disk:
            options = {**_options(disk, folder, method, family), "final_only": True}
            status, text = _victim(options)
            assert status == 0, f"exit {status}: {text}"
            earlier, taken = _files(disk), _used(disk)
            with _filled(disk, share * taken):
                _assert_says(*_victim(options), disk / "run")
                _assert_stays(disk, earlier)
            assert _victim(options)[0] == 0

    return check


def _read_only_at_step(method: str, family: str) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        with _disk(folder) as disk:
            options = _options(disk, folder, method, family)
            # Mounted over itself: the kernel refuses to close a disk on which a file, the lock, is open.
            command = ["sh", "-c", f"mount --bind '{disk}' '{disk}' && mount -o remount,bind,ro '{disk}'"]
            _assert_says(*_victim({**options, "at_step": [3, command]}), disk / "run")
            subprocess.run(["umount", str(disk)], check=True)
            assert (disk / "run" / "checkpoint-2").is_dir()
            status, text = _victim(options)
            assert status == 0, f"exit {status} when it can be written again: {text}"
            assert json.loads(Path(options["result"]).read_text()) == _whole_training(method, family)["losses"]

    return check


def _replaced_by_a_file(method: str, family: str) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        run = folder / "run"
        command = ["sh", "-c", f"rm -r '{run}' && touch '{run}'"]
        options = {**_options(folder, folder, method, family), "at_step": [3, command]}
        _assert_says(*_victim(options), run)

    return check


def _vanished(method: str, family: str) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        options = _options(folder, folder, method, family)
        status, text = _victim({**options, "at_step": [3, ["rm", "-r", str(folder / "run")]]})
        assert status == 0, f"exit {status}: {text}"
        assert json.loads(Path(options["result"]).read_text()) == _whole_training(method, family)["losses"]
        assert (folder / "run" / "checkpoint-6").is_dir()

    return check


@functools.cache
def _whole_training_of(method: str, family: str, adapters: bool) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="torture-disk-") as name, _disk(Path(name)) as disk:
        options = {**_options(disk, Path(name), method, family), "adapters": adapters}
        status, text = _victim(options)
        assert status == 0, f"exit {status}: {text}"
        return {"losses": json.loads(Path(options["result"]).read_text()), "room": _used(disk)}


def _whole_training(method: str, family: str, adapters: bool = False) -> dict[str, object]:
    """Losses of a training that nothing disturbs, and the bytes that it takes."""
    with _lock:
        return _whole_training_of(method, family, adapters)


def _options(disk: Path, folder: Path, method: str, family: str) -> dict[str, object]:
    return {"run": str(disk / "run"), "result": str(folder / "losses.json"), "method": method, "family": family}


def _victim(options: dict[str, object]) -> tuple[int, str]:
    return _run([python(), VICTIM, json.dumps(options)])


# Commands


def _train(out: Path) -> list[str]:
    return ["train", *SMALL, "--overwrite_output_dir", "--output_dir", str(out)]


def _merge(out: Path) -> list[str]:
    return ["merge", "--adapter", str(_made("train")), "--output_dir", str(out)]


def _evaluate(out: Path) -> list[str]:
    rows = _made("train").with_name("rows.jsonl")
    rows.write_text('{"source": "a b", "target": "c"}\n')
    flags = ["--source_column", "source", "--target_column", "target"]
    return ["evaluate", "--adapter", str(_made("train")), "--test_file", str(rows), *flags, "--output_dir", str(out)]


def _compare(out: Path) -> list[str]:
    return ["compare", "--methods", "lora", "--tasks", "classification", *SMALL, "--output_dir", str(out)]


def _report(out: Path) -> list[str]:
    return ["report", str(_made("compare")), "--output_dir", str(out)]


COMMANDS = {"train": _train, "merge": _merge, "evaluate": _evaluate, "compare": _compare, "report": _report}


def _full_command(name: str, share: float) -> Callable[[Path], None]:
    """A command with too little room for its result."""

    def check(folder: Path) -> None:
        with _lock:
            room, command = _room(name), COMMANDS[name]
            command(folder)  # makes what it reads
        with _disk(folder) as disk:
            with _filled(disk, share * room):
                status, text = _command(command(disk / "out"))
                _assert_says(status, text, disk / "out", may_be_told=name == "compare")
                if name == "merge":
                    assert not (disk / "out").exists(), "half a model was left"
                hidden = [path.name for path in disk.rglob(".*")]
                assert not hidden, f"leftovers: {hidden}"
            status, text = _command(command(disk / "out"))
            assert status == 0, f"exit {status} with room: {text}"

    return check


def _read_only(name: str) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        with _lock:
            command = COMMANDS[name](folder / "disk" / "out")
        with _disk(folder) as disk:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            status, text = _command(command)
            _assert_says(status, text, disk / "out")
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
            assert not list(disk.iterdir())

    return check


def _full_output(folder: Path) -> None:
    """The shell sends the answers to a file on a full disk."""
    with _lock:
        adapter = _made("train")
    with _disk(folder) as disk, _filled(disk, 0), (disk / "answers.txt").open("wb") as answers:
        command = [python(), "-m", "left_trainer.cli.main", "generate", "--adapter", str(adapter)]
        done = subprocess.run(
            command, env=ENVIRONMENT, input=b"a b c\n" * 16, stdout=answers, stderr=subprocess.PIPE, check=False
        )
        text = done.stderr.decode()
        assert done.returncode == 1, f"exit {done.returncode}: {text}"
        assert "Traceback" not in text, text
        assert "cannot be written because the disk is full" in text, text


@functools.cache
def _made(name: str) -> Path:
    """The output of a command that nothing disturbs, made once for the process."""
    out = Path(tempfile.mkdtemp(prefix="torture-made-")) / "out"
    status, text = _command(COMMANDS[name](out))
    assert status == 0, f"exit {status}: {text}"
    return out


@functools.cache
def _room(name: str) -> int:
    """Bytes that the output of a command takes."""
    with tempfile.TemporaryDirectory(prefix="torture-disk-") as folder, _disk(Path(folder)) as disk:
        status, text = _command(COMMANDS[name](disk / "out"))
        assert status == 0, f"exit {status}: {text}"
        return _used(disk)


def _command(arguments: Sequence[str]) -> tuple[int, str]:
    return _run([python(), "-m", "left_trainer.cli.main", *arguments])


def _run(command: Sequence[str]) -> tuple[int, str]:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


# Disks


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[Path]:
    """A disk of its own below `folder`."""
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        disk.rmdir()
        raise NotRunError(f"a disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
        disk.rmdir()


@contextlib.contextmanager
def _filled(disk: Path, free_bytes: float) -> Iterator[None]:
    """Leave so much room on the disk."""
    filler = disk / "filler"
    room = os.statvfs(disk)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(4096, room.f_bavail * room.f_frsize - int(free_bytes)))
    try:
        yield
    finally:
        filler.unlink()


def _used(disk: Path) -> int:
    room = os.statvfs(disk)
    return (room.f_blocks - room.f_bfree) * room.f_frsize


def _files(disk: Path) -> dict[str, bytes]:
    paths = [path for path in disk.rglob("*") if path.is_file() and path.name not in ("filler", "README.md")]
    return {str(path.relative_to(disk)): path.read_bytes() for path in paths}


# What must happen


def _assert_says(status: int, text: str, path: Path, may_be_told: bool = False) -> None:
    """One sentence with the path; of a comparison, also as the reason why a run failed."""
    assert status > 0, f"exit {status}: {text[-1500:]}"
    assert "Traceback" not in text, text[-3000:]
    said = [line for line in text.splitlines() if "cannot be written because" in line]
    assert said, f"no sentence: {text[-1500:]}"
    assert may_be_told or len(said) == 1, said
    assert str(path) in said[0], f"{path} is not named: {said[0]}"


def _assert_stays(disk: Path, earlier: dict[str, bytes]) -> None:
    now = _files(disk)
    changed = [name for name, content in earlier.items() if now.get(name) != content]
    assert not changed, f"changed or gone: {changed}"
    hidden = list(disk.rglob(".*"))
    assert not hidden, f"leftovers: {hidden}"
