"""The table of a comparison in trackers, each run for real, offline."""

from __future__ import annotations

import contextlib
import json
import sqlite3

import pytest

from left_trainer.cli.main import main
from left_trainer.comparison.results import write_results
from run_results import make_result

SCORES = [("base", 20.0), ("lora", 50.5), ("ia3", 40.0)]
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def folder(tmp_path):
    """Results of an untrained model and of two methods."""
    (tmp_path / "out").mkdir()
    results = [make_result("base", rouge=20.0), make_result(rouge=50.5), make_result("ia3", rouge=40.0)]
    write_results(results, tmp_path / "out")
    return tmp_path / "out"


def test_tensorboard_has_the_table_and_each_row(folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["report", str(folder), "--log_table", "tensorboard"]) == 0
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("comparison/text_summary")
    assert "| lora |" in text.tensor_proto.string_val[0].decode()
    scores = []
    for row in sorted(path for path in (folder / "tensorboard").iterdir() if path.is_dir()):
        of_row = EventAccumulator(str(row))
        of_row.Reload()
        scores.append(of_row.Scalars("rougeL")[0].value)
    assert scores == [score for _, score in SCORES]


def scores_in(columns, rows) -> list[tuple[str, float]]:
    named = [dict(zip(columns, row, strict=True)) for row in rows]
    return [(row["method"], row["rougeL_mean"]) for row in named]


def test_wandb_has_the_table_offline(folder, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main(["report", str(folder), "--log_table", "wandb"]) == 0
    (file,) = folder.glob("wandb/offline-run-*/files/media/table/comparison_*.json")
    table = json.loads(file.read_text())
    assert scores_in(table["columns"], table["data"]) == SCORES


def test_trackio_has_the_table(folder, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(folder / "trackio"))
    pytest.importorskip("trackio")
    assert main(["report", str(folder), "--log_table", "trackio"]) == 0
    (database,) = folder.glob("trackio/*.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        ((metrics,),) = connection.execute("SELECT metrics FROM metrics").fetchall()
    rows = json.loads(metrics)["comparison"]["_value"]
    assert scores_in(rows[0], [row.values() for row in rows]) == SCORES


@pytest.mark.parametrize("command", ["compare", "report"])
def test_trackers_that_are_not_there_are_refused_at_once(command, tmp_path, monkeypatch, capsys, no_weights):
    given = [str(tmp_path)] if command == "report" else []
    for name, message in (
        ("tensorbord", "log_table='tensorbord' is not known. Did you mean 'tensorboard'?"),
        ("trackio", "log_table='trackio' needs the package trackio: pip install trackio."),
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(SystemExit) as exit_info:
            main([command, *given, "--output_dir", str(tmp_path / "out"), "--log_table", name])
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
