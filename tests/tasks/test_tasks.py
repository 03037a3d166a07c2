"""What every task has to offer, held against each one that is registered."""

from __future__ import annotations

import dataclasses
from random import Random

import pytest

from left_trainer import Task, get_task, list_tasks, load_tokenizer, register_task
from left_trainer.data.loading import embedded_data
from left_trainer.embedded import MODEL_NAMES
from left_trainer.embedded.pretrain import passage
from left_trainer.evaluation.named_metrics import load_metric

MAX_TRAIN_ROWS = 4000
EACH_TASK = pytest.mark.parametrize("task", list_tasks(), ids=lambda task: task.name)


@pytest.fixture(scope="module")
def data():
    return {task.name: embedded_data(task) for task in list_tasks()}


def test_the_tasks_of_the_package():
    assert {task.name for task in list_tasks()} >= {"summarization", "translation", "dialogue", "classification"}


def scores(task: Task, predictions: list[str], references: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in task.metrics:
        new = load_metric(name).compute(predictions=predictions, references=references)
        assert not found.keys() & new.keys()
        found |= new
    return found


@EACH_TASK
def test_the_main_score_tells_a_perfect_prediction_from_a_wrong_one(task, data):
    references = list(data[task.name]["test"][task.target_column])
    assert scores(task, references, references)[task.main_metric] == pytest.approx(100)
    assert scores(task, ["xyzzy"] * len(references), references)[task.main_metric] < 5


@EACH_TASK
def test_embedded_splits_are_of_a_size_that_trains_quickly(task, data):
    assert {split: len(rows) for split, rows in data[task.name].items()} == task.embedded_splits
    assert task.embedded_splits["train"] <= MAX_TRAIN_ROWS
    assert task.embedded_splits["validation"] == task.embedded_splits["test"] == 100


@EACH_TASK
def test_the_embedded_models_have_never_seen_the_prompt(task):
    rng = Random(0)
    corpus = "\n".join("\n".join(passage(rng)) for _ in range(500))
    for line in task.prompt.replace("{source}", "\n").split("\n"):
        assert not line.strip() or line.strip() not in corpus


@EACH_TASK
@pytest.mark.parametrize("model", sorted(MODEL_NAMES))
def test_every_target_fits_into_what_is_generated(task, model, data):
    tokenizer = load_tokenizer(MODEL_NAMES[model])
    rows = data[task.name]["train"].select(range(200))
    pairs = zip(rows[task.source_column], rows[task.target_column], strict=True)
    completions = [task.render(source, target)["completion"] + tokenizer.eos_token for source, target in pairs]
    lengths = [len(ids) for ids in tokenizer(completions, add_special_tokens=False)["input_ids"]]
    assert max(lengths) <= task.max_new_tokens


@EACH_TASK
def test_a_hub_data_set_is_named_in_full(task):
    hub = task.hub_dataset
    assert hub is not None
    assert hub.name.count("/") == 1
    assert hub.source_column != hub.target_column


def test_dialogue_rows_end_with_the_user(data):
    for row in data["dialogue"]["test"]:
        speakers = [line.split(":")[0] for line in row["dialogue"].split("\n")]
        assert speakers == ["User", "Assistant"] * (len(speakers) // 2) + ["User"]
        assert row["response"].strip()


def test_labels_are_balanced(data):
    labels = list(data["classification"]["test"]["label"])
    assert set(labels) == {"positive", "negative"}
    assert 40 <= labels.count("positive") <= 60


def test_a_name_is_taken_once():
    task = get_task("dialogue")
    with pytest.raises(ValueError, match=r"task name 'dialogue' of .* is already taken"):
        register_task(task)
    with pytest.raises(ValueError, match="Did you mean 'dialogue'"):
        get_task("dialog")


def test_a_prompt_is_checked_when_a_task_is_made():
    with pytest.raises(ValueError, match=r"it needs \{source\} once"):
        Task("title", "text to title", "text", "title", "Title:", ("rouge",), "rougeL", 16)


def test_generated_rows_need_the_sizes_of_their_splits():
    with pytest.raises(ValueError, match=r"embedded_splits={'train': 5} of the task 'dialogue' needs"):
        dataclasses.replace(get_task("dialogue"), embedded_splits={"train": 5})
