"""Files on disk: whole or absent, with the permissions of others; one run to a folder; one sentence for a disk."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from left_trainer.storage import owners
from left_trainer.storage.errors import WriteFailedError, write_errors
from left_trainer.storage.locks import LOCK_FILE, FolderInUseError, check_folder_free, folder_lock
from left_trainer.storage.whole import hidden_name, sweep, whole_directory, whole_file, whole_files
from processes import ENVIRONMENT

HOLDS_THE_LOCK = """
import sys, time
from left_trainer.storage.locks import folder_lock
with folder_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def dead_owner():
    """The token of a process that has ended."""
    code = "from left_trainer.storage.owners import token; print(token())"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def left_by(owner, path, kind="tmp"):
    return path.with_name(hidden_name(path, kind).name.replace(owners.token(), owner))


@pytest.mark.parametrize("write", [whole_directory, whole_files])
def test_an_error_leaves_the_earlier_folder(write, tmp_path):
    with write(tmp_path / "model") as folder:
        (folder / "config.json").write_text("old")
    with pytest.raises(FileNotFoundError), write(tmp_path / "model") as folder:
        (folder / "config.json").write_text("new") and (folder / "missing").read_text()
    assert (tmp_path / "model" / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "config.json"]


def test_the_old_folder_stays_where_the_new_one_cannot_be_renamed(tmp_path, monkeypatch):
    with whole_directory(tmp_path / "model") as folder:
        (folder / "a").write_text("old")
    rename = Path.rename

    def refuse(self, target):
        if self.name.endswith(".tmp"):
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(WriteFailedError, match="the disk is full"), whole_directory(tmp_path / "model") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "model" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_files_of_another_form_do_not_stay_beside_the_new_ones(tmp_path):
    for names in (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], ["model.safetensors"]):
        with whole_files(tmp_path) as folder:
            for name in names:
                (folder / name).write_text(name)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_killed_processes_leave_is_swept(tmp_path, dead_owner):
    """Complete files arrive, half ones go, a folder without a successor comes back; a live process is left alone."""
    mine = hidden_name(tmp_path / "mine")
    theirs = left_by(dead_owner, tmp_path / "theirs")
    ready = left_by(dead_owner, tmp_path / "files", "ready")
    replaced = left_by(dead_owner, tmp_path / "checkpoint-2", "old")
    for folder in (mine, theirs, ready, replaced):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
    notes = tmp_path / ".notes.tmp"
    notes.write_text("of the user")
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, notes.name, "config.json", "checkpoint-2"}
    assert (tmp_path / "config.json").read_text() == ready.name


def test_a_number_that_is_used_again_is_another_process(tmp_path):
    host, pid, start = owners.token().split("-")
    assert owners.is_alive(f"{host}-{pid}-{start}", tmp_path)
    assert not owners.is_alive(f"{host}-{pid}-{int(start) - 100}", tmp_path)


def test_another_machine_is_alive_while_it_writes(tmp_path):
    owner = "00000000-1-1"
    assert owners.is_alive(owner, tmp_path)
    os.utime(tmp_path, (0, 0))
    assert not owners.is_alive(owner, tmp_path)


def test_permissions_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_directory(tmp_path / "folder") as folder:
            save_file({"a": torch.ones(1)}, folder / "a.safetensors")
        with whole_file(tmp_path / "folder" / "b.safetensors") as part:
            save_file({"a": torch.ones(1)}, part)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "folder").iterdir()} == {0o640}


def test_a_second_process_is_refused_until_the_first_is_killed(python, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_THE_LOCK, str(tmp_path)], env=ENVIRONMENT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        for enter in (lambda: folder_lock(tmp_path).__enter__(), lambda: check_folder_free(tmp_path)):
            with pytest.raises(FolderInUseError, match=rf"output_dir=.* in use by process {process.pid} on \S+\. Wait"):
                enter()
        process.kill()
    check_folder_free(tmp_path)
    with folder_lock(tmp_path), folder_lock(tmp_path):  # two trainers of one process
        assert (tmp_path / LOCK_FILE).exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"the disk is full \(2.0 KiB needed, .* free\)"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up"),
        (OSError(errno.EROFS, "Read-only file system"), "its disk is read-only"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), "the disk is full"),
        (FileNotFoundError(errno.ENOENT, "No such file", "{folder}/gone/file"), "its folder no longer exists"),
    ],
)
def test_a_disk_is_spoken_of_in_one_sentence(error, says, tmp_path):
    if isinstance(error, OSError) and error.filename:
        error.filename = error.filename.format(folder=tmp_path)
    target = tmp_path / "gone" / "file" if "no longer" in says else tmp_path / "file"
    with pytest.raises(WriteFailedError, match=says) as caught, write_errors(target, 2048):
        raise error
    assert repr(str(target)) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("os errors"),
        RuntimeError("CUDA out of memory"),
        FileNotFoundError(errno.ENOENT, "No such file", "/nowhere/rows.jsonl"),
        PermissionError(errno.EACCES, "Permission denied", "/nowhere/rows.jsonl"),
    ],
)
def test_other_errors_are_left_as_they_are(error, tmp_path):
    with pytest.raises(type(error)) as caught, write_errors(tmp_path / "file"):
        raise error
    assert caught.value is error
