"""Rows of named settings: what they are called, whose share of quality they have, and which columns that adds."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from typing import Any

import pytest
from matplotlib.image import imread

from left_trainer.comparison.output import write_outputs
from left_trainer.comparison.results import Result, check_comparable, read_results
from left_trainer.comparison.rows import WHERE_ROWS_DIFFER, Summary
from left_trainer.comparison.summary import summarize
from left_trainer.comparison.tables import latex, markdown, terminal
from left_trainer.comparison.teachers import share_of
from left_trainer.runs.report import Metrics
from run_results import CONDITIONS, ODD, make_result, named, sized


def shares(summary: Summary) -> dict[str, Any]:
    return {row.method: row.values["teacher_share"] and round(row.values["teacher_share"], 6) for row in summary.rows}


def keys(summary: Summary) -> set[str]:
    return {column.key for column in summary.columns}


def test_the_name_is_what_is_shown():
    summary = summarize([make_result("base"), named("b", 40.0), named("a", 30.0), make_result("full", rouge=20.0)])
    assert [row.method for row in summary.rows] == ["base", "b", "a", "full"]
    assert [row.id for row in summary.rows][1] == "summarization/b"
    assert summary.title == "3 settings on 1 task"
    failed = Result(named("c", 0.0).cell, None, "why")
    assert [item.method for item in summarize([named("b", 1.0), failed]).failures] == ["c"]


def test_seeds_of_a_setting_are_one_row_and_settings_of_a_method_are_several():
    results = [named(name, rouge, seed=seed) for name, rouge in (("a", 10.0), ("b", 20.0)) for seed in (42, 43)]
    summary = summarize(results)
    assert {row.method: row.seeds for row in summary.rows} == {"a": (42, 43), "b": (42, 43)}


def test_rows_without_a_name_say_how_they_learn_and_shrink():
    arguments = [{}, {"shrink_to": "params=0.5"}, {"shrink_to": "params=0.5", "teacher_model": "x"}]
    results = [
        make_result("full", rouge=float(number), cell={"arguments": {"peft_method": "full", "seed": 42, **given}})
        for number, given in enumerate(arguments)
    ]
    assert [row.method for row in summarize(results).rows] == [
        "full (teacher_model x, shrink_to params=0.5)",
        "full (no teacher_model, shrink_to params=0.5)",
        "full (no teacher_model, no shrink_to)",
    ]


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([named("teacher", 50.0), named("alone", 25.0)], {"teacher": 100, "alone": 50}),
        ([named("big", 50.0), named("s", 40.0, "big"), named("alone", 25.0)], {"big": 100, "s": 80, "alone": 50}),
        ([named("teacher", 50.0), named("x", 20.0), named("s", 10.0, "x")], {"teacher": 100, "x": 40, "s": 50}),
        ([named("x", 50.0), named("y", 20.0), named("s", 10.0, "x"), named("t", 10.0, "y")], {
            "x": None, "y": None, "s": 20, "t": 50,
        }),
        ([named("x", 50.0), named("y", 20.0)], {"x": None, "y": None}),
        ([named("teacher", 0.0), named("s", 10.0)], {"teacher": None, "s": None}),
        (
            [named("teacher", 50.0), named("teacher", 20.0, model="n"), named("s", 10.0, "teacher", model="n")],
            {"teacher (model m)": 100, "teacher (model n)": 100, "s": 50},
        ),
    ],
)  # fmt: skip
def test_the_share_is_that_of_the_setting_that_is_referred_to(results, expected):
    assert shares(summarize(results)) == expected


def test_a_share_of_an_error_is_the_other_way_round():
    assert share_of(0.4, 0.2, is_lower_better=True) == 50
    assert share_of(0.0, 0.2, is_lower_better=True) is None
    assert share_of(20.0, 40.0, is_lower_better=False) == 50


def test_a_base_has_no_share_and_a_score_that_is_missing_neither():
    unscored = named("s", 0.0, metrics=Metrics(None, {"rougeL": None}))
    assert shares(summarize([make_result("base"), named("teacher", 50.0), unscored])) == {
        "base": None, "teacher": 100, "s": None,
    }  # fmt: skip


def test_columns_that_only_sizes_need_are_shown_where_rows_differ_in_them():
    sizes = {"base_parameters": 900, "model_size_bytes": 4000}
    plain = [make_result("base", **sizes), make_result("lora", **sizes), make_result("ia3", **sizes)]
    assert not keys(summarize(plain)) & set(WHERE_ROWS_DIFFER)
    half = make_result("full", base_parameters=450, model_size_bytes=2000)
    assert keys(summarize([*plain, half])) & set(WHERE_ROWS_DIFFER) == {"base_parameters", "model_size_bytes"}
    assert "teacher_share" in keys(summarize([named("teacher", 50.0), named("s", 40.0)]))
    assert "model" in keys(summarize([named("a", 50.0), named("b", 40.0, model="n")]))


def test_tables_plots_and_page_show_sizes_and_odd_names(tmp_path):
    results = sized()
    check_comparable(result.cell for result in results)
    summary = write_outputs(results, tmp_path)
    assert read_results(tmp_path) == results
    assert [row.method for row in summary.rows if row.is_untrained] == ["base (model m)", "base (model n)"]
    own = next(row for row in summary.rows if row.method == "own")
    assert own.metrics["rougeL"].before == 7
    for name in ("quality_size.png", "quality_speed.png"):
        assert imread(tmp_path / name).std() > 0.01
    text = markdown(summary)
    assert "| a/b \\| \\<i>\\$\\_%\\\\\\`学 |" in text
    assert "| base (model m) | 5.0 |" in text
    assert "| 91.7 % |" in text
    assert "\\textbackslash{}" in latex(summary)
    assert ODD in terminal(summary, tmp_path)
    lines = {line["method"]: line for line in csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text()))}
    assert lines[ODD]["base_parameters"] == "250"
    assert lines["own"]["model"] == "n"
    assert ODD.replace("<", "\\u003c").replace("\\`", "\\\\`").split("学")[0] in (tmp_path / "index.html").read_text()


def test_pictures_have_room_for_names_of_any_length(tmp_path):
    write_outputs([named(f"{letter} " + "long name " * 7, 50.0) for letter in "abc"], tmp_path)  # or a warning
    assert imread(tmp_path / "quality_memory.png").std() > 0.01


def test_pictures_of_sizes_are_drawn_of_sizes_alone(tmp_path):
    write_outputs([make_result("base"), make_result("lora")], tmp_path)
    assert not list(tmp_path.glob("quality_s*.png"))


def test_models_of_their_own_are_comparable_where_settings_have_names():
    other = {**CONDITIONS, "base_model": "n"}
    base = make_result("base").cell
    check_comparable([base, named("a", 1.0).cell, named("b", 1.0, model="n").cell, replace(base, conditions=other)])
    with pytest.raises(ValueError, match=r"different models.* Give a setting that has a model of its own a name"):
        check_comparable([base, replace(make_result().cell, conditions=other)])
    with pytest.raises(ValueError, match="different prompts"):
        check_comparable(
            [named("a", 1.0).cell, replace(named("b", 1.0).cell, conditions={**CONDITIONS, "prompt": "x"})]
        )
