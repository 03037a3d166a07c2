"""Who has a cell: one process at a time, whatever becomes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from left_trainer.comparison import claims as claims_module
from left_trainer.comparison.attempt import Attempt
from left_trainer.comparison.cell import FAILURE_FILE, Cell
from left_trainer.comparison.claims import OWNER_FILE, Claim, ClaimWatch, claims, last_claim, n_lost
from left_trainer.comparison.results import read_cell
from left_trainer.runs.json_records import write_json

ELSEWHERE = "00000000-1-1"
CONDITIONS = {"base_model": "embedded/t5", "prompt": "p", "data_sha256": "0", "max_new_tokens": 8, "num_beams": 1}
CELL = Cell("method", "classification", {"peft_method": "lora", "seed": 1}, CONDITIONS)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when a test says so."""
    now = [0.0]
    monkeypatch.setattr(claims_module.time, "monotonic", lambda: now[0])
    return now


def taken(folder: Path, process: str | None = None, takeover_seconds: float = 60) -> Claim:
    """The next claim, as a process of this machine or of another one has it."""
    claim = Claim(folder, len(claims(folder)) + 1)
    owner = claim.take(takeover_seconds)
    if process is not None:
        write_json(claim.folder / OWNER_FILE, replace(owner, process=process))
    return claim


def test_one_of_many_has_the_claim(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        owners = list(pool.map(lambda _: Claim(tmp_path, 1).take(60), range(64)))
    assert sum(owner is not None for owner in owners) == 1


def test_a_cell_is_free_until_it_is_taken_and_after_it_is_released(tmp_path):
    watch = ClaimWatch()
    assert watch.free(tmp_path / "cell that nobody has written") == Claim(tmp_path / "cell that nobody has written", 1)
    first = taken(tmp_path)
    assert watch.free(tmp_path) is None
    first.release()
    assert watch.free(tmp_path) == Claim(tmp_path, 2)
    assert n_lost(tmp_path) == 0


def test_a_process_of_another_machine_is_gone_once_it_is_silent(tmp_path, clock):
    """By the clock of who looks: the file's own time may be that of any machine."""
    claim, watch = taken(tmp_path, ELSEWHERE, takeover_seconds=60), ClaimWatch(5)
    os.utime(claim.folder / OWNER_FILE, (1, 1))
    for seconds in (0, 50, 59):
        clock[0] = seconds
        assert watch.free(tmp_path) is None
    claim.beat()
    for seconds in (61, 120):
        clock[0] = seconds
        assert watch.free(tmp_path) is None
    clock[0] = 122
    assert watch.free(tmp_path) == Claim(tmp_path, 2)
    assert ClaimWatch(5).free(tmp_path) is None  # who comes later has not heard it be silent
    assert n_lost(tmp_path) == 1


def test_a_process_of_this_machine_is_gone_at_once(tmp_path):
    code = "from left_trainer.storage import owners; print(owners.token())"
    token = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    taken(tmp_path, token)
    assert ClaimWatch().free(tmp_path) == Claim(tmp_path, 2)


def test_an_owner_that_was_killed_before_it_wrote_its_name(tmp_path, clock):
    (tmp_path / "claim-1").mkdir()
    watch = ClaimWatch(5)
    assert watch.free(tmp_path) is None
    (tmp_path / "claim-1" / OWNER_FILE).write_text('{"host":')
    clock[0] = 4
    assert watch.free(tmp_path) is None
    clock[0] = 10
    assert watch.free(tmp_path) == Claim(tmp_path, 2)


def test_lost_owners_are_counted_from_the_last_that_was_not(tmp_path):
    taken(tmp_path, ELSEWHERE)
    taken(tmp_path).release()
    assert n_lost(tmp_path) == 0
    taken(tmp_path, ELSEWHERE)
    taken(tmp_path, ELSEWHERE)
    assert n_lost(tmp_path) == 2
    assert [claim.number for claim in claims(tmp_path)] == [1, 2, 3, 4]


def test_an_owner_that_wakes_up_has_lost_the_cell(tmp_path):
    first = taken(tmp_path)
    assert first.beat()
    (first.run_folder / "weights").touch()
    second = taken(tmp_path)
    assert not first.beat()
    assert second.beat()
    assert not first.run_folder.exists()
    first.release()
    assert last_claim(tmp_path) == second
    assert ClaimWatch().free(tmp_path) is None


@pytest.fixture
def process(monkeypatch):
    """In place of a cell's process: leaves a reason in its folder, and runs what a test gives."""
    meanwhile = []

    def start(self, environment, fork_server):
        code = f"open({str(self.claim.run_folder / FAILURE_FILE)!r}, 'w').write('{{\"reason\": \"x\"}}')"
        child = subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE)
        for action in meanwhile:
            action(self.claim)
        return child

    monkeypatch.setattr(Attempt, "_start", start)
    return meanwhile


def test_a_result_is_where_others_look_for_it_once_it_is_whole(tmp_path, process):
    folder = tmp_path / CELL.name
    folder.mkdir()
    CELL.write(folder)
    (folder / "adapter_model.safetensors").touch()
    (folder / "log.txt").touch()
    process.append(lambda claim: pytest.fail("too early") if read_cell(folder) else None)
    Attempt(Claim(folder, 1), CELL, 60).run()
    assert read_cell(folder).failure == "x"
    assert {path.name for path in folder.iterdir()} == {"cell.json", "claim-1", FAILURE_FILE, "log.txt"}
    assert [path.name for path in (folder / "claim-1").iterdir()] == ["released.json"]


def test_what_has_lost_its_cell_leaves_no_result(tmp_path, process):
    folder = tmp_path / CELL.name
    folder.mkdir()
    process.append(lambda claim: taken(folder, ELSEWHERE))
    Attempt(Claim(folder, 1), CELL, 60).run()
    assert read_cell(folder) is None
    assert not (folder / FAILURE_FILE).exists()
    assert last_claim(folder).number == 2


def test_what_comes_second_runs_nothing(tmp_path, process):
    folder = tmp_path / CELL.name
    folder.mkdir()
    process.append(lambda claim: pytest.fail("it ran"))
    taken(folder, ELSEWHERE)
    Attempt(Claim(folder, 1), CELL, 60).run()
    CELL.write(folder)
    write_json(folder / FAILURE_FILE, {"reason": "ended meanwhile"})
    Attempt(Claim(folder, 2), CELL, 60).run()
    assert read_cell(folder).failure == "ended meanwhile"
