"""What a comparison does not run, and in which order it runs the rest."""

from __future__ import annotations

import psutil
import pytest

from left_trainer.comparison.cell import Cell
from left_trainer.comparison.planned import arranged
from left_trainer.comparison.results import CELLS, read_cell
from left_trainer.comparison.runner import Runner

METHODS = ("full", "lora", "prefix_tuning")
CONDITIONS = {"base_model": "embedded/t5", "prompt": "p", "data_sha256": "0", "max_new_tokens": 8, "num_beams": 1}
CELLS_OF = [Cell("method", "classification", {"peft_method": name, "seed": 1}, CONDITIONS) for name in METHODS]
BASE = Cell("base", "classification", {}, {})


@pytest.fixture
def free(monkeypatch):
    """Sets the free memory of this machine."""
    plain = psutil.virtual_memory()
    return lambda size: monkeypatch.setattr(psutil, "virtual_memory", lambda: plain._replace(available=size))


def test_the_cheapest_run_first_and_bases_before_them(tmp_path):
    kept, left_out = arranged([*CELLS_OF, BASE], tmp_path)
    assert [cell.method if cell.kind != "base" else "base" for cell in kept] == ["base", *reversed(METHODS)]
    assert not left_out


def test_what_needs_more_than_there_is_is_left_out_with_the_reason(tmp_path, free):
    free(30 * 2**20)
    kept, left_out = arranged(CELLS_OF, tmp_path)
    assert [cell.method for cell in kept] == ["prefix_tuning"]
    assert all("Left out: the run needs" in reason and "30.0 MiB on this CPU" in reason for _, reason in left_out)
    assert len(arranged(CELLS_OF[-1:], tmp_path, jobs=2)[1]) == 1


def test_it_is_run_all_the_same_where_that_is_asked_for(tmp_path, free):
    free(1)
    asked = Cell("method", "classification", {**CELLS_OF[0].arguments, "ignore_plan": True}, CONDITIONS)
    assert asked.name == CELLS_OF[0].name
    assert arranged([asked], tmp_path) == ([asked], [])


def test_a_cell_that_cannot_be_planned_is_left_to_its_own_process(tmp_path, free):
    free(1)
    broken = Cell("method", "classification", {"peft_method": "lora", "model_name_or_path": "nowhere/at-all"}, {})
    assert arranged([broken], tmp_path) == ([broken], [])


def test_the_runner_notes_what_it_left_out(tmp_path, free):
    free(1)
    results = []
    runner = Runner(tmp_path, 1, results.append, *[lambda *_: pytest.fail("a cell was run")] * 2)
    runner._run(CELLS_OF[:1])
    (result,) = results
    assert result.failure.startswith("Left out: the run needs ")
    assert read_cell(tmp_path / CELLS / result.cell.name) == result
