"""What a comparison does not run, and in which order it runs the rest."""

from __future__ import annotations

import psutil
import pytest

from left_trainer.comparison.cell import Cell
from left_trainer.comparison.engines import make_engine
from left_trainer.comparison.grid import Grid
from left_trainer.comparison.layout import Plan
from left_trainer.comparison.plan_file import PlanFile
from left_trainer.comparison.planned import Arranger
from left_trainer.comparison.results import CELLS, read_cell
from left_trainer.comparison.worker import Terms, Worker

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
    kept, left_out = Arranger(tmp_path)([*CELLS_OF, BASE])
    assert [cell.method if cell.kind != "base" else "base" for cell in kept] == ["base", *reversed(METHODS)]
    assert not left_out


def test_what_needs_more_than_there_is_is_left_out_with_the_reason(tmp_path, free):
    free(30 * 2**20)
    kept, left_out = Arranger(tmp_path)(CELLS_OF)
    assert [cell.method for cell in kept] == ["prefix_tuning"]
    assert all("Left out: the run needs" in reason and "30.0 MiB on this CPU" in reason for _, reason in left_out)
    assert len(Arranger(tmp_path, jobs=2)(CELLS_OF[-1:])[1]) == 1


def test_it_is_run_all_the_same_where_that_is_asked_for(tmp_path, free):
    free(1)
    asked = Cell("method", "classification", {**CELLS_OF[0].arguments, "ignore_plan": True}, CONDITIONS)
    assert asked.name == CELLS_OF[0].name
    assert Arranger(tmp_path)([asked]) == ([asked], [])


def test_a_cell_that_cannot_be_planned_is_left_to_its_own_process(tmp_path, free):
    free(1)
    broken = Cell("method", "classification", {"peft_method": "lora", "model_name_or_path": "nowhere/at-all"}, {})
    assert Arranger(tmp_path)([broken]) == ([broken], [])


def test_what_was_left_out_is_noted_by_who_works_alone_and_left_to_others_beside_them(tmp_path, free, monkeypatch):
    monkeypatch.setattr("left_trainer.comparison.attempt.Attempt.run", lambda *_: pytest.fail("a cell was run"))
    free(1)
    plan = PlanFile(Grid((), (Plan((), CELLS_OF[:1]),), {}), str(tmp_path))
    results = []

    def worker(**terms):
        return Worker(tmp_path, plan, make_engine("local", 1, {}, tmp_path), Terms(**terms), results.append)

    beside = worker(leaves_out=False)
    assert not beside.run()
    assert list(beside.too_large) == [CELLS_OF[0].name]
    assert results == []
    assert worker().run()
    (result,) = results
    assert result.failure.startswith("Left out: the run needs ")
    assert read_cell(tmp_path / CELLS / result.cell.name) == result
