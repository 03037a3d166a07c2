"""A run for every task, with generated text and without."""

from __future__ import annotations

import pytest
from transformers import GenerationConfig

from left_trainer import fine_tune, format_report, get_task, list_tasks, set_up
from left_trainer.data.arguments import DataArguments, ModelArguments
from left_trainer.runs.build_report import majority_share
from left_trainer.runs.fine_tuning import TASK_DEFAULTS, with_task_settings
from left_trainer.runs.report import TrainingReport

MODELS = ("embedded/t5", "embedded/llama")
TASKS = [task.name for task in list_tasks()]
SMALL = DataArguments(max_train_samples=8, max_eval_samples=6)


def run_of(task, model, make_args, **overrides):
    args = make_args(**{**TASK_DEFAULTS, "max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, **overrides})
    return set_up(get_task(task), ModelArguments(model_name_or_path=model), SMALL, args)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("task", TASKS)
def test_a_run_without_generation_reports_the_loss_alone(task, model, make_args):
    run = run_of(task, model, make_args, predict_with_generate=False)
    report = fine_tune(run)
    assert set(report.metrics.before) == set(report.metrics.after) >= {"loss"}
    assert not {get_task(task).main_metric, "generated_length"} & set(report.metrics.after)
    assert report.metrics.after["loss"] == pytest.approx(run.trainer.evaluate_loss(run.data["test"]))
    assert report.samples == ()
    assert "loss" in format_report(report, "folder")
    assert TrainingReport.read(run.trainer.args.output_dir) == report


def test_the_share_of_the_most_frequent_label_is_shown(make_args):
    report = fine_tune(run_of("classification", "embedded/t5", make_args))
    assert 100 / 6 <= report.majority_share <= 100
    line = f"Always answering with the most frequent label has an accuracy of {report.majority_share:.2f}."
    assert line in format_report(report, "folder")


def test_the_share_counts_labels_as_accuracy_does():
    assert majority_share(get_task("classification"), ["good", " Good", "bad", "good\n"]) == 75
    assert majority_share(get_task("summarization"), ["a", "a"]) is None


@pytest.mark.parametrize("task", TASKS)
def test_a_generation_config_beats_what_the_task_generates_with(task, make_args):
    config = GenerationConfig(max_new_tokens=5)
    args = with_task_settings(get_task(task), make_args(generation_config=config))
    assert (args.generation_max_length, args.generation_num_beams) == (None, None)
    own = with_task_settings(get_task(task), make_args(generation_max_length=7))
    assert (own.generation_max_length, own.generation_num_beams) == (7, get_task(task).num_beams)
