"""Rows from files and from the grammar, and how they become prompts and features."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
from pathlib import Path

import pyarrow
import pytest
from datasets import ClassLabel, Dataset, Features, Translation, Value

from left_trainer import (
    DataArguments,
    HubDataset,
    LeftTrainer,
    get_task,
    list_tasks,
    load_task_data,
    load_tokenizer,
    prepare_task_data,
)
from left_trainer.data.loading import embedded_data
from left_trainer.data.prompts import to_prompts
from left_trainer.embedded import MODEL_PATHS
from left_trainer.models import ModelSource
from left_trainer.tasks.task import check_prompt
from tiny import tiny_model, tiny_tokenizer

TASK = get_task("summarization")
ROWS = [{"document": f"Text number {i}.", "summary": f"Number {i}.", "other": i} for i in range(40)]


def write(path: Path, rows=ROWS) -> str:
    data = Dataset.from_list(rows)
    {".jsonl": data.to_json, ".csv": data.to_csv, ".parquet": data.to_parquet}[path.suffix](str(path))
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_files(suffix, tmp_path):
    path = write(tmp_path / f"rows{suffix}")
    data = load_task_data(TASK, DataArguments(train_file=path, test_file=path, max_train_samples=10))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 10, "validation": 2, "test": 40}
    assert data["test"][3] == {"source": "Text number 3.", "target": "Number 3."}


def test_rows_held_out_are_not_trained_on(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    data = load_task_data(TASK, DataArguments(train_file=path))
    assert not set(data["train"]["source"]) & set(data["validation"]["source"])
    assert list(data["test"]["source"]) == list(data["validation"]["source"])
    again = load_task_data(TASK, DataArguments(train_file=path))
    assert list(again["validation"]["source"]) == list(data["validation"]["source"])


def test_a_local_folder_as_a_data_set(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl")
    data = load_task_data(TASK, DataArguments(dataset_name=str(tmp_path)))
    assert len(data["train"]) == 40


def test_files_of_a_folder_whose_columns_differ(tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl", [{"document": "a", "references": ["b"]}])
    with pytest.raises(ValueError, match=r"dataset_name=.* cannot be read: .*columns.* pass them with --train_file"):
        load_task_data(TASK, DataArguments(dataset_name=str(tmp_path)))


@pytest.mark.parametrize("name", ["run[1]", "run?", "a*", "a::b"])
def test_a_folder_whose_name_would_be_a_pattern(name, tmp_path):
    for folder in (name, "run1", "runx", "ab"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "train.jsonl")
    with pytest.raises(ValueError, match=r"dataset_name=.* is the folder .* pattern .*--train_file"):
        load_task_data(TASK, DataArguments(dataset_name=str(tmp_path / name)))


def test_a_folder_with_the_name_of_a_data_set(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    name = TASK.hub_dataset.name
    Path(name).mkdir(parents=True)
    write(Path(name, "train.jsonl"))
    columns = {"source_column": "document", "target_column": "summary", "dataset_config_name": "default"}
    with caplog.at_level("WARNING"):
        data = load_task_data(TASK, DataArguments(dataset_name=name, **columns))
    assert len(data["train"]) == 38
    assert f"dataset_name={name!r} is read from the folder" in caplog.text
    with pytest.raises(ValueError, match=r"is a file\. Pass it with --train_file"):
        load_task_data(TASK, DataArguments(dataset_name=f"{name}/train.jsonl"))


def test_rows_are_cut_as_without_the_quick_look(tokenizers, monkeypatch):
    """Texts that surely fit are not tokenized to see whether they do."""
    rows = Dataset.from_list(
        [
            {"source": text * number, "target": "red" * number}
            for text in ("word ", "été", "日本")
            for number in range(30)
        ]
    )
    for family, model_type in (("encoder_decoder", "t5"), ("decoder_only", "llama")):
        source, tokenizer = ModelSource.of(tiny_model(model_type)), tokenizers[family]
        quick = to_prompts(rows, TASK, tokenizer, source, 60, max_new_tokens=8).to_list()
        with monkeypatch.context() as patched:
            patched.setattr("left_trainer.data.prompts.most_tokens", lambda text: 10**9)
            assert to_prompts(rows, TASK, tokenizer, source, 60, max_new_tokens=8).to_list() == quick
        assert 0 < sum(row["source_was_cut"] for row in quick) < len(quick)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"train_file": "missing.jsonl"}, FileNotFoundError, "train_file='missing.jsonl' does not exist"),
        ({"train_file": "rows.txt"}, ValueError, r"ends in '.txt'. Allowed: .jsonl"),
        ({"validation_file": "rows.jsonl"}, ValueError, "without train_file"),
        ({"train_file": "rows.jsonl", "dataset_name": "x"}, ValueError, "both given"),
        ({"train_file": "empty.jsonl"}, ValueError, "is empty: it has no rows"),
        ({"train_file": "broken.jsonl"}, ValueError, "broken.jsonl', line 1 is no JSON"),
        (
            {"train_file": "rows.jsonl", "source_column": "documents"},
            ValueError,
            r"no column 'documents'.*Did you mean 'document'\? Present: document, summary, other.*--source_column",
        ),
        ({"train_file": "blank.jsonl"}, ValueError, "blank.jsonl', line 2 has ' ' as its target"),
        ({"train_file": "rows.jsonl", "prompt": "no field"}, ValueError, r"needs \{source\} once"),
    ],
)
def test_unusable_input(arguments, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("rows.jsonl"))
    Path("rows.txt").write_text("x")
    Path("empty.jsonl").write_text("")
    Path("broken.jsonl").write_text('{"document": ')
    write(Path("blank.jsonl"), [{"document": "a", "summary": "b"}, {"document": "a", "summary": " "}] * 2)
    with pytest.raises(error, match=message):
        load_task_data(TASK, DataArguments(**arguments))


def saved(folder: Path, rows, features: Features | None = None) -> str:
    """A data set on disk that `load_dataset` reads, with one Parquet file a split."""
    folder.mkdir()
    for split in ("train", "validation", "test"):
        Dataset.from_list(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return str(folder)


def test_a_dot_goes_into_a_nested_column(tmp_path):
    rows = [{"id": str(i), "translation": {"en": f"cat {i}", "fr": f"chat {i}"}} for i in range(4)]
    features = Features({"id": Value("string"), "translation": Translation(languages=["en", "fr"])})
    for number, kind in enumerate((None, features)):
        name = saved(tmp_path / str(number), rows, kind)
        columns = {"source_column": "translation.en", "target_column": "translation.fr"}
        data = load_task_data(get_task("translation"), DataArguments(dataset_name=name, **columns))
        assert data["test"][2] == {"source": "cat 2", "target": "chat 2"}
        columns["target_column"] = "translation"
        with pytest.raises(ValueError, match=r"no column 'translation'.*Did you mean 'translation.fr'\?"):
            load_task_data(get_task("translation"), DataArguments(dataset_name=name, **columns))


def test_class_labels_become_their_names(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    name = saved(tmp_path / "rows", [{"text": f"text {i}", "label": i % 2} for i in range(4)], features)
    data = load_task_data(get_task("classification"), DataArguments(dataset_name=name))
    assert list(data["train"]["target"]) == ["bad", "good", "bad", "good"]
    assert data["train"][0] == {"source": "text 0", "target": "bad"}


@pytest.mark.parametrize("features", [None, Features({"text": Value("string"), "label": ClassLabel(names=["a"])})])
def test_integers_that_are_no_class_are_refused(features, tmp_path):
    name = saved(tmp_path / "rows", [{"text": "text", "label": -1}] * 2, features)
    with pytest.raises(ValueError, match=r"Row 0 of the train rows has -1 as its target.*datasets.ClassLabel"):
        load_task_data(get_task("classification"), DataArguments(dataset_name=name))


def test_turns_become_lines(tmp_path):
    rows = [{"dialogue": ["User: Hello.", "Assistant: Yes?", "User: Tea."], "response": "Here."}] * 2
    data = load_task_data(get_task("dialogue"), DataArguments(train_file=write(tmp_path / "rows.jsonl", rows)))
    assert data["train"][0] == {"source": "User: Hello.\nAssistant: Yes?\nUser: Tea.", "target": "Here."}


def test_the_hub_data_set_of_a_task_brings_its_configuration_and_columns(tmp_path):
    name = saved(tmp_path / "rows", [{"nested": {"a": "1", "b": "2"}, "document": "3", "summary": "4"}] * 2)
    (tmp_path / "rows" / "README.md").write_text(
        "---\nconfigs:\n- config_name: first\n  data_files: train.parquet\n"
        "- config_name: second\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {split}.parquet\n" for split in ("train", "test"))
        + "---\n"
    )
    task = dataclasses.replace(TASK, hub_dataset=HubDataset(name, "nested.a", "nested.b", config_name="second"))
    assert load_task_data(task, DataArguments(dataset_name=name))["test"][0] == {"source": "1", "target": "2"}
    named = DataArguments(dataset_name=name, dataset_config_name="first", source_column="summary")
    assert load_task_data(task, named)["train"][0] == {"source": "4", "target": "2"}
    other = DataArguments(dataset_name=name, dataset_config_name="second")
    assert load_task_data(TASK, other)["test"][0] == {"source": "3", "target": "4"}


def test_one_column_may_be_source_and_target(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    data = load_task_data(TASK, DataArguments(train_file=path, target_column="document"))
    assert data["train"][0]["source"] == data["train"][0]["target"]


def test_a_task_without_data_asks_for_them():
    task = dataclasses.replace(TASK, generate_row=None, embedded_splits={})
    with pytest.raises(ValueError, match=r"task 'summarization' has no data of its own. Pass --train_file"):
        load_task_data(task, DataArguments())


def test_too_few_different_rows_are_reported():
    task = dataclasses.replace(TASK, generate_row=lambda rng: {"document": "same", "summary": "same"})
    with pytest.raises(ValueError, match=r"generate_row of the task 'summarization' has too few.*validation has 0 of"):
        embedded_data(task)


@pytest.mark.parametrize("task", list_tasks(), ids=lambda task: task.name)
def test_embedded_data_are_repeatable_and_splits_differ(task):
    first, second = embedded_data(task), embedded_data(task)
    for split in ("train", "validation", "test"):
        assert first[split].to_list() == second[split].to_list()
        assert {task.source_column, task.target_column} <= set(first[split].column_names)
    sources = {split: set(rows[task.source_column]) for split, rows in first.items()}
    for one, other in itertools.combinations(sources, 2):
        assert not sources[one] & sources[other]


def test_generated_rows_are_stored_once_and_what_is_made_of_them_is_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    for module in ("datasets.arrow_dataset", "datasets.fingerprint"):
        monkeypatch.setattr(f"{module}.update_fingerprint", lambda old, *_: f"{old}0")
    path, made = str(MODEL_PATHS["encoder_decoder"]), []
    for _ in range(2):
        tokenizer, source = load_tokenizer(path), ModelSource.of(path)
        rows = load_task_data(TASK, DataArguments())
        made.append(to_prompts(rows["validation"], TASK, tokenizer, source, max_length=60))
    assert made[0].cache_files == made[1].cache_files != []
    assert rows["validation"].to_list() == text_columns_of(embedded_data(TASK)["validation"])
    assert len(list(tmp_path.glob("left_trainer/*.arrow"))) == len(rows) + 1  # prompts


@pytest.mark.parametrize("reason", ["caching is off", "the folder is a file", "the disk is full"])
def test_generated_rows_stay_in_memory_where_nothing_can_be_stored(reason, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
    if reason == "caching is off":
        monkeypatch.setattr("datasets.is_caching_enabled", lambda: False)
    elif reason == "the folder is a file":
        folder.write_text("")
    else:
        monkeypatch.setattr(pyarrow.ipc, "new_stream", raiser(OSError(errno.ENOSPC, "No space left on device")))
    rows = load_task_data(TASK, DataArguments())["validation"]
    assert rows.cache_files == []
    assert rows.to_list() == text_columns_of(embedded_data(TASK)["validation"])


def text_columns_of(rows):
    return [{"source": row[TASK.source_column], "target": row[TASK.target_column]} for row in rows]


def raiser(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("family", ["encoder_decoder", "decoder_only"])
def test_a_long_source_is_cut_and_the_rest_survives(family, tokenizers):
    source = ModelSource.of(tiny_model("t5" if family == "encoder_decoder" else "llama"))
    tokenizer = tokenizers[family]
    rows = Dataset.from_list([{"source": "word " * 500, "target": "the end"}])
    (row,) = to_prompts(rows, TASK, tokenizer, source, max_length=60)
    assert row["prompt"].startswith("Summarize: word")
    assert row["prompt"].endswith("\nSummary:")
    length = len(tokenizer(row["prompt"] + (row["completion"] if family == "decoder_only" else ""))["input_ids"])
    assert 40 < length <= 60
    with pytest.raises(ValueError, match="leaves no room for the source"):
        to_prompts(rows, TASK, tokenizer, source, max_length=10)


def test_a_soft_prompt_and_a_long_source_fit_into_absolute_positions(make_args, tmp_path):
    """GPT-2 has no position after its last one: virtual tokens have to come out of the source."""
    folder = tmp_path / "gpt2"
    tiny_model("gpt2").save_pretrained(folder)
    tiny_tokenizer("decoder_only").save_pretrained(folder)
    rows = Dataset.from_list([{"document": "word " * 500, "summary": "the end"}] * 4)
    rows.to_json(str(tmp_path / "rows.jsonl"))
    args = make_args(peft_method="prompt_tuning", peft_kwargs={"num_virtual_tokens": 30}, max_steps=1)
    tokenizer = load_tokenizer(folder)
    data = prepare_task_data(TASK, DataArguments(train_file=str(tmp_path / "rows.jsonl")), str(folder), tokenizer, args)
    trainer = LeftTrainer(str(folder), args, train_dataset=data["train"], processing_class=tokenizer)
    trainer.train()
    assert 90 <= len(trainer.train_dataset[0]["input_ids"]) <= 128 - 30


@pytest.mark.parametrize("prompt", ["{source} {source}", "{text}", "", "{source", "{}"])
def test_prompts_need_one_source(prompt):
    with pytest.raises(ValueError, match="prompt="):
        check_prompt(prompt)
    check_prompt("Say {{so}}: {source}")


def test_records_serialise(tmp_path):
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    assert len(load_task_data(TASK, DataArguments(train_file=str(tmp_path / "rows.json")))["train"]) == 38
