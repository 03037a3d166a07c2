"""From the lines of results.jsonl to tables and plots: what is averaged, set apart, refused and written."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from left_trainer.cli.main import main
from left_trainer.comparison.cell import Cell
from left_trainer.comparison.output import write_outputs
from left_trainer.comparison.plots import pareto_front
from left_trainer.comparison.results import Result, check_comparable, merge, read_results, write_results
from left_trainer.comparison.rows import COLUMNS, Summary
from left_trainer.comparison.summary import interval, summarize
from left_trainer.comparison.tables import format_value, latex, markdown, to_csv
from left_trainer.runs.json_records import to_json
from left_trainer.runs.report import Metrics, PeakMemory, Sample, TrainingReport
from left_trainer.runs.tuning import Trial, TuningResult
from page_summary import make_summary

MIB = 1024**2
CONDITIONS = {"base_model": "m", "data_sha256": "d", "prompt": "{source}", "max_new_tokens": 8, "num_beams": 1}
VERSIONS = dict.fromkeys(("python", "torch", "transformers", "peft", "trl"), "1.0")


def make_result(method: str = "lora", seed: int = 42, rouge: float = 50.0, **changes: Any) -> Result:
    """A finished run, or the base model's; `changes` replace fields of the report."""
    is_base = method == "base"
    arguments = {"peft_method": "full" if is_base else method, "seed": seed}
    scores = {"rougeL": rouge, "loss": 1.0, "generated_length": 5.0, "runtime": 1.0}
    report = TrainingReport(
        method=method,
        peft_kwargs={},
        task="summarization",
        prompt="{source}",
        base_model="m",
        trainable_parameters=None if is_base else 10,
        total_parameters=1000,
        trainable_percent=None if is_base else 1.0,
        matched_modules=(),
        metrics=Metrics(scores if is_base else None, None if is_base else scores),
        learning_rate=1e-3,
        learning_rate_source="default",
        train_steps=0 if is_base else 20,
        train_batch_size=16,
        train_steps_per_second=4.0,
        train_samples_per_second=64.0,
        train_target_tokens_per_second=400.0,
        generation_samples_per_second=30.0,
        peak_memory_bytes=PeakMemory(500 * MIB, 450 * MIB),
        fast_paths={},
        adapter_size_bytes=2048,
        loss_history=((10, 2.0), (20, 1.0)),
        samples=(Sample("s", "r", prediction=method),),
        seed=seed,
        versions=VERSIONS,
        device="cpu",
        machine="a machine",
        memory_before_model_bytes=400 * MIB,
        general_loss=2.0 if is_base else 2.5,
    )
    cell = Cell("base" if is_base else "method", "summarization", arguments, CONDITIONS)
    return Result(cell, replace(report, **changes))


@pytest.mark.parametrize("size", [2, 3, 5, 21])
def test_intervals_are_those_of_students_t(size):
    stats = pytest.importorskip("scipy.stats", reason="comes with scikit-learn")
    values = [random.Random(seed).uniform(0, 100) for seed in range(size)]
    mean, low, high = interval(values)
    expected = stats.t.interval(0.95, size - 1, loc=mean, scale=stats.sem(values))
    assert (high - mean, mean - low) == pytest.approx((expected[1] - mean, mean - expected[0]), rel=1e-3)


def test_one_seed_has_no_interval():
    assert interval([3.0]) == (3.0, None, None)


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
