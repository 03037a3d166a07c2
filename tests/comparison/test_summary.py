"""From the lines of results.jsonl to tables and plots: what is averaged, set apart, refused and written."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from matplotlib.text import Text

from left_trainer import Task, list_methods, register_task
from left_trainer.cli.main import main
from left_trainer.comparison import plots
from left_trainer.comparison.cell import Cell
from left_trainer.comparison.output import write_outputs
from left_trainer.comparison.plots import draw_plots, pareto_front
from left_trainer.comparison.results import Result, check_comparable, merge, read_results, write_results
from left_trainer.comparison.rows import COLUMNS, Summary
from left_trainer.comparison.summary import summarize
from left_trainer.comparison.tables import format_value, latex, markdown, terminal, to_csv
from left_trainer.comparison.tuned import best_learning_rate
from left_trainer.evaluation.intervals import Interval
from left_trainer.evaluation.scores import is_lower_better
from left_trainer.runs.json_records import to_json
from left_trainer.runs.report import Metrics
from left_trainer.runs.tuning import Trial, TuningResult
from left_trainer.tasks.registry import TASKS
from page_summary import make_summary
from run_results import CONDITIONS, MIB, make_result


@pytest.mark.parametrize("seed", range(20))
def test_the_pareto_front_is_what_nothing_beats(seed):
    rng = random.Random(seed)
    points = [(float(rng.randint(0, 6)), float(rng.randint(0, 6))) for _ in range(12)]
    best = {
        index
        for index, (cost, score) in enumerate(points)
        if not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points)
    }
    assert set(pareto_front(points)) == best


def test_runs_that_differ_in_the_seed_are_one_row():
    results = [make_result("base", rouge=20.0), *(make_result(seed=seed, rouge=rouge) for seed, rouge in SEEDS.items())]
    summary = summarize(results)
    assert [row.id for row in summary.rows] == ["summarization/base", "summarization/lora"]
    base, row = summary.rows
    assert row.seeds == (42, 43, 44)
    assert row.metrics["rougeL"].before == 20
    assert row.metrics["rougeL"].mean == pytest.approx(60)
    assert row.metrics["rougeL"].high - row.metrics["rougeL"].mean == pytest.approx(24.84, abs=0.01)
    assert set(row.metrics) == {"rougeL"}
    assert row.values["peak_memory_train_bytes"] == 100 * MIB
    assert row.values["general_loss_before"] == 2.0
    assert row.values["general_loss_after"] == 2.5
    assert to_json(row.samples) == [{"source": "s", "reference": "r", "before": "base", "after": "lora"}]
    assert len(row.curves) == 3
    assert set(row.values) == {column.key for column in COLUMNS}
    assert base.values["train_steps_per_second"] is None
    assert base.metrics["rougeL"].mean == base.metrics["rougeL"].before == 20


def test_with_one_seed_the_main_metric_has_the_interval_over_rows():
    intervals = {"base": (15.0, 24.0), "lora": (45.0, 58.0)}
    summary = summarize([make_result(name, score_interval=Interval(*ends)) for name, ends in intervals.items()])
    for row, interval in zip(summary.rows, intervals.values(), strict=True):
        score = row.metrics["rougeL"]
        assert (score.low, score.high, score.interval) == (*interval, "rows")
    assert "over the rows of the test split (bootstrap)" in markdown(summary)
    several = [make_result(seed=seed, rouge=rouge, score_interval=Interval(0.0, 1.0)) for seed, rouge in SEEDS.items()]
    (row,) = summarize(several).rows
    assert row.metrics["rougeL"].interval == "seeds"
    assert row.metrics["rougeL"].high > 80


def on_task(task: str, method: str, metric: str, score: float, **changes: Any) -> Result:
    """A finished run on another task than `make_result`'s."""
    scores = {metric: score, "loss": 1.0}
    metrics = Metrics(scores, None) if method == "base" else Metrics(None, scores)
    result = make_result(method, task=task, metrics=metrics, **changes)
    return replace(result, cell=replace(result.cell, task=task))


def test_the_best_methods_come_first():
    scores = {"summarization": {"lora": 10.0, "ia3": 30.0, "prefix_tuning": 20.0}}
    scores["dialogue"] = {"lora": 10.0, "ia3": 20.0, "prefix_tuning": 30.0}
    scores["translation"] = {"lora": 1.0, "prefix_tuning": 2.0}
    results = [
        on_task(task, method, "chrf" if task == "translation" else "rougeL", score)
        for task, found in scores.items()
        for method, score in found.items()
    ]
    summary = summarize([*results, make_result("base", rouge=99.0), failed()])
    orders = {task.name: [row.method for row in summary.rows_of(task)] for task in summary.tasks}
    assert orders["summarization"] == ["base", "ia3", "prefix_tuning", "lora"]
    assert orders["dialogue"] == ["prefix_tuning", "ia3", "lora"]
    assert summary.methods == ("base", "prefix_tuning", "ia3", "lora")


@pytest.fixture
def dictation() -> Iterator[Task]:
    """A task of a user, judged by a metric of the hub of which less is better."""
    with TASKS.temporarily():
        metrics, lower = ("wer", "mine"), ("mine",)
        record = Task("dictation", "sound to text", "a", "b", "{source}", metrics, "wer", 8, lower_is_better=lower)
        yield register_task(record)


def test_a_metric_of_which_less_is_better(dictation, tmp_path):
    rates = {"base": 0.9, "lora": 0.2, "ia3": 0.5}
    results = [on_task("dictation", method, "wer", rate) for method, rate in rates.items()]
    summary = summarize(results)
    (task,) = summary.tasks
    assert [row.method for row in summary.rows] == ["base", "lora", "ia3"]
    assert task.lower_is_better == ("wer",)
    assert is_lower_better("mine", dictation.lower_is_better)
    assert "Lower wer is better" in markdown(summary)
    reports = {rate: on_task("dictation", "lora", "wer", rate).report for rate in (0.3, 0.1)}
    assert best_learning_rate(reports, dictation) == 0.1
    draw_plots(summary, tmp_path)


def test_the_majority_label_stands_beside_the_untrained_model(tmp_path):
    scores = {"base": 9.0, "lora": 63.0}
    results = [
        on_task("classification", name, "accuracy", score, majority_share=61.5) for name, score in scores.items()
    ]
    summary = write_outputs(results, tmp_path)
    base, majority, _ = summary.rows
    assert (base.method, majority.method, majority.metrics["accuracy"].mean) == ("base", "majority label", 61.5)
    assert majority.is_reference
    text = (tmp_path / "table.md").read_text()
    assert "| majority label | 61.5 |" in text
    assert "majority label" in terminal(summary, tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert [row["accuracy_mean"] for row in rows] == ["9.0", "61.5", "63.0"]
    assert not [row for row in summarize([make_result()]).rows if row.is_reference]


def test_what_scores_depend_on_is_said():
    (task,) = summarize([make_result("base", test_rows=65), make_result(test_rows=65, run_seconds=90.0)]).tasks
    assert task.settings["test rows"] == "65"
    assert [task.settings[key] for key in ("prompt", "beams", "new tokens at most")] == ['"{source}"', "1", "8"]
    summary = summarize([make_result(run_seconds=90.0), make_result("ia3", run_seconds=45.0)])
    assert summary.run_seconds == 135
    assert "All runs took 2 min 15 s." in markdown(summary)
    assert summary.rows[0].values["run_seconds"] == 90


def test_no_curve_lies_under_a_name(tmp_path, monkeypatch):
    """Names of curves stand beside the axes, as those of points do."""
    boxes = {}

    def look(figure: Any, path: Path) -> None:
        figure.draw_without_rendering()
        for axes in figure.axes:
            assert axes.get_legend() is None
            frame = axes.get_window_extent()
            names = [text for text in axes.texts if text.get_text() not in ("untrained", "majority label")]
            boxes[path.name] = sorted((Text.get_window_extent(text) for text in names), key=lambda box: box.y0)
            assert all(box.x0 > frame.x1 for box in boxes[path.name])
            assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes[path.name]))

    monkeypatch.setattr(plots, "_save", look)
    names = [method.name for method in list_methods()]
    results = [make_result(name, rouge=50 + index % 9) for index, name in enumerate(names)]
    draw_plots(summarize([make_result("base"), *results]), tmp_path)
    assert len(boxes["training_curves.png"]) == len(names)


def test_predictions_travel_with_merged_results(tmp_path):
    folders, lora = [], make_result()
    for name, result in (("a", lora), ("b", make_result("ia3"))):
        folder = tmp_path / name
        (folder / "cells" / result.cell.name).mkdir(parents=True)
        (folder / "cells" / result.cell.name / "predictions.jsonl").write_text(f"{name}\n")
        write_outputs([result], folder)
        folders.append(str(folder))
    assert main(["report", *folders, "--output_dir", str(tmp_path / "both")]) == 0
    place = f"cells/{lora.cell.name}/predictions.jsonl"
    assert (tmp_path / "both" / place).read_text() == "a\n"
    assert place in (tmp_path / "both" / "index.html").read_text()
    (row,) = write_outputs([lora], tmp_path / "elsewhere").rows
    assert row.predictions == ()


SEEDS = {42: 50.0, 43: 60.0, 44: 70.0}


def test_the_allocators_figure_is_taken_as_it_is_on_a_gpu():
    (row,) = summarize([make_result(device="cuda:0")]).rows
    assert row.values["peak_memory_train_bytes"] == 500 * MIB


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"train_batch_size": 8}, "lora (batch size 8)"),
        ({"peft_kwargs": {"r": 32}}, "lora (r: 32)"),
        ({"learning_rate": 1e-2}, "lora (learning rate 0.01)"),
        ({"machine": "another"}, "lora (machine another)"),
        ({"host": "b"}, "lora (host b)"),
        ({"host": "b", "learning_rate": 1e-2}, "lora (learning rate 0.01)"),
    ],
)
def test_runs_that_differ_in_more_are_told_apart(changes, label):
    rows = summarize([make_result(), make_result(**changes)]).rows
    assert len({row.id for row in rows}) == 2
    assert rows[1].method == label


def test_what_is_not_a_number_is_not_shown():
    summary = summarize([make_result(loss_history=((10, float("nan")),), rouge=float("inf"))]).to_json()
    assert "NaN" not in json.dumps(summary)
    assert "Infinity" not in json.dumps(summary)
    assert summary["rows"][0]["curves"] == [[[10, None]]]


TUNING = TuningResult("rougeL", 3, (Trial(6e-4, 31.1, 4, 0.4), Trial(2e-3, None, 4, 0.4)), 8, 0.8)


@pytest.mark.parametrize(
    ("changes", "source", "notes"),
    [
        ({"learning_rate_source": "given"}, "given", ""),
        ({"learning_rate_source": "default"}, "default", ""),
        (
            {"learning_rate_source": "tuned", "tuning": TUNING},
            "tuned",
            "tuned: best of 3 by rougeL on the validation split (0.0006: 31.1, 0.002: no score), 8 steps, 1 s of "
            "training",
        ),
    ],
)
def test_people_read_where_the_learning_rate_comes_from(changes, source, notes):
    (row,) = summarize([make_result(**changes)]).rows
    assert row.values["learning_rate_source"] == source
    assert row.notes == notes


def test_the_page_gets_the_keys_that_it_reads():
    """`page_summary` is what the scripts of the page are tested on."""
    summary, made_up = summarize([make_result("base"), make_result(), failed()]).to_json(), make_summary()
    assert summary.keys() == made_up.keys()
    for part in ("tasks", "columns", "rows", "failures"):
        assert {frozenset(item) for item in summary[part]} == {frozenset(item) for item in made_up[part]}
    (sample,) = summary["rows"][1]["samples"]
    assert sample.keys() == made_up["rows"][1]["samples"][0].keys()
    assert summary["rows"][1]["metrics"]["rougeL"].keys() == made_up["rows"][1]["metrics"]["rougeL"].keys()


def failed() -> Result:
    cell = Cell("method", "summarization", {"peft_method": "ia3", "seed": 42}, CONDITIONS)
    return Result(cell, None, "CUDA out of memory & more")


@pytest.fixture
def summary() -> Summary:
    return summarize([make_result("base", rouge=20.0), *map(make_result, ["lora", "prefix_tuning"]), failed()])


def test_markdown(summary):
    text = markdown(summary)
    assert "| base | 20.0 |" in text
    assert "| lora | 50.0 |" in text
    assert "| ia3 | failed |" in text
    assert "ia3 on summarization, seed 42: CUDA out of memory" in text
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)]
    assert len(tables) == 2
    for table in tables:
        assert len({line.count("|") for line in table}) == 1


def test_csv(summary):
    rows = list(csv.DictReader(io.StringIO(to_csv(summary))))
    assert [row["method"] for row in rows] == ["base", "lora", "prefix_tuning", "ia3"]
    assert rows[1]["rougeL_mean"] == "50.0"
    assert rows[1]["peak_memory_train_bytes"] == str(100.0 * MIB)
    assert rows[3]["failure"] == "CUDA out of memory & more"
    assert all(None not in row for row in rows)


def test_latex(summary):
    text = latex(summary)
    assert r"prefix\_tuning" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    for block in text.split(r"\midrule")[1:]:
        rows = block.split(r"\bottomrule")[0].strip().splitlines()
        assert len({row.count("&") for row in rows}) == 1
        assert all(row.endswith(r"\\") for row in rows)


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (None, "bytes", "-"),
        (1234567, "integer", "1,234,567"),
        (1536, "bytes", "1.5 KiB"),
        (0.12345, "percent", "0.123"),
        (3.14159, "rate", "3.14"),
        (1234.5, "rate", "1,234"),
        (0.0006, "learning_rate", "0.0006"),
    ],
)
def test_figures_for_people(value, kind, text):
    assert format_value(value, kind) == text


def test_everything_is_written(tmp_path):
    results = [make_result("base", rouge=20.0), make_result(), make_result("prefix_tuning"), failed()]
    write_outputs(results, tmp_path / "new")
    names = {file.name for file in (tmp_path / "new").iterdir()}
    assert names >= {"results.jsonl", "table.md", "table.csv", "table.tex", "index.html"}
    for name in ("quality_memory", "quality_parameters", "training_curves"):
        assert imread(tmp_path / "new" / f"{name}.png").std() > 0.05
    assert read_results(tmp_path / "new") == results


def test_a_grid_without_a_finished_run_is_written_too(tmp_path):
    write_outputs([failed()], tmp_path)
    assert "ia3 | failed" in (tmp_path / "table.md").read_text()


def different(result: Result, **conditions: Any) -> Result:
    return Result(replace(result.cell, conditions={**CONDITIONS, **conditions}), result.report)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"base_model": "other"}, "different models: 'm' and 'other'"),
        ({"data_sha256": "e"}, "summarization has different data"),
        ({"prompt": "Say {source}"}, "different prompts"),
        ({"num_beams": 4}, "different numbers of beams: 1 and 4"),
    ],
)
def test_what_cannot_be_compared_is_refused_unless_told(conditions, message, tmp_path, capsys):
    for folder, result in (("a", make_result()), ("b", different(make_result("ia3"), **conditions))):
        (tmp_path / folder).mkdir()
        write_results([result], tmp_path / folder)
    folders = [str(tmp_path / "a"), str(tmp_path / "b"), "--output_dir", str(tmp_path / "both")]
    with pytest.raises(SystemExit):
        main(["report", *folders])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "both").exists()
    assert main(["report", *folders, "--allow_mixed"]) == 0
    assert len(read_results(tmp_path / "both")) == 2
    assert (tmp_path / "both" / "index.html").is_file()


def test_seeds_of_several_machines_are_merged(tmp_path, capsys):
    folders = []
    for seed, rouge in SEEDS.items():
        folder = tmp_path / str(seed)
        folder.mkdir()
        write_results([make_result("base", rouge=20.0), make_result(seed=seed, rouge=rouge)], folder)
        folders.append(str(folder))
    assert main(["report", *folders, "--output_dir", str(tmp_path / "all")]) == 0
    assert "60.0 ± 24.8" in capsys.readouterr().out
    assert len(read_results(tmp_path / "all")) == 4


def test_seeds_of_unlike_machines_are_one_row_with_the_speed_of_the_first(tmp_path):
    places = {42: ("a", "fast", 9.0), 43: ("b", "slow", 3.0), 44: ("a", "fast", 11.0)}
    results = [
        make_result(seed=seed, rouge=SEEDS[seed], host=host, machine=machine, train_steps_per_second=speed)
        for seed, (host, machine, speed) in places.items()
    ]
    summary = summarize([make_result("base", rouge=20.0, host="c"), *results])
    base, row = summary.rows
    assert (row.method, row.seeds, row.metrics["rougeL"].mean) == ("lora", (42, 43, 44), 60.0)
    assert row.values["train_steps_per_second"] == 10
    assert (base.values["host"], row.values["host"]) == ("c", "a, b")
    assert "host" in {column.key for column in summary.columns}
    assert "of the first of these machines: a, fast (seeds 42, 44); b, slow (seeds 43)." in row.notes
    assert [text.split(";")[0] for text in summary.machines] == ["c: a machine", "a: fast", "b: slow"]


def test_where_all_ran_on_one_host_none_is_named():
    summary = summarize([make_result("base", host="a"), make_result(host="a")])
    assert "host" not in {column.key for column in summary.columns}
    assert summary.machines[0].startswith("a machine;")
    assert not any(row.notes for row in summary.rows)


def test_the_same_run_counts_once_and_two_measurements_of_it_are_refused(tmp_path):
    for name, rouge in (("a", 50.0), ("copy", 50.0), ("other", 55.0)):
        (tmp_path / name).mkdir()
        write_results([make_result(rouge=rouge)], tmp_path / name)
    assert len(merge([tmp_path / "a", tmp_path / "copy"])) == 1
    with pytest.raises(ValueError, match="measured twice on the same machine"):
        merge([tmp_path / "a", tmp_path / "other"])


def test_a_finished_run_beats_its_failure_elsewhere(tmp_path):
    done = Result(failed().cell, make_result("ia3").report)
    for name, result in (("a", failed()), ("b", done)):
        (tmp_path / name).mkdir()
        write_results([result], tmp_path / name)
    assert [result.report is None for result in merge([tmp_path / "a", tmp_path / "b"])] == [False]


def test_bad_folders_are_refused(tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.jsonl").write_text("{}\n")
    (tmp_path / "full").mkdir()
    write_results([make_result()], tmp_path / "full")
    (tmp_path / "more").mkdir()
    write_results([make_result("ia3")], tmp_path / "more")
    full, more = str(tmp_path / "full"), str(tmp_path / "more")
    for arguments, message in (
        ([str(tmp_path / "none")], "has no results.jsonl"),
        ([str(tmp_path / "broken")], "Line 1 of"),
        ([full, more], "--output_dir DIR"),
        ([full, "--output_dir", more], "is not one of the folders"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(["report", *arguments])
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err
    assert len(read_results(Path(more))) == 1


def test_comparable_tasks_may_have_different_data():
    one = make_result().cell
    other = replace(one, task="dialogue", conditions={**CONDITIONS, "data_sha256": "e", "prompt": "x {source}"})
    check_comparable([one, other])
