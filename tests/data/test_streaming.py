"""Training rows that are read while training."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

from left_trainer import DataArguments, LeftTrainer, get_task, list_tasks, load_task_data, prepare_task_data
from left_trainer.data import files
from left_trainer.data.splits import HELD_OUT_OF_STREAM
from left_trainer.trainer.batching import with_own_batches
from tiny import FAMILY_TYPES, tiny_model, tiny_tokenizer

TASK = get_task("summarization")


@pytest.fixture
def file(tmp_path) -> str:
    """1,000 rows, each with its number."""
    path = tmp_path / "rows.jsonl"
    rows = ({"document": f"text {number}", "summary": f"sum {number}"} for number in range(1000))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def first_sources(rows, n_rows: int) -> list[str]:
    return [row["source"] for row in itertools.islice(rows, n_rows)]


def test_the_first_rows_are_held_out(file):
    data = load_task_data(TASK, DataArguments(train_file=file, streaming=True, max_train_samples=30))
    assert isinstance(data["train"], IterableDataset)
    assert [len(data[split]) for split in ("validation", "test")] == [HELD_OUT_OF_STREAM] * 2
    assert first_sources(data["train"], 100) == [f"text {HELD_OUT_OF_STREAM + number}" for number in range(30)]


def test_few_rows_are_split_as_those_of_a_file(file, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(Path(file).read_text().splitlines(keepends=True)[:40]))
    data = load_task_data(TASK, DataArguments(train_file=str(few), streaming=True))
    assert (len(data["validation"]), len(list(data["train"]))) == (2, 38)
    few.write_text(few.read_text().splitlines()[0])
    with pytest.raises(ValueError, match="one training row and no validation rows"):
        load_task_data(TASK, DataArguments(train_file=str(few), streaming=True))


def test_other_files_are_read_in_whole(file):
    data = load_task_data(
        TASK, DataArguments(train_file=file, validation_file=file, streaming=True, max_eval_samples=7)
    )
    assert first_sources(data["train"], 2) == ["text 0", "text 1"]
    assert data["test"]["source"][:] == [f"text {number}" for number in range(7)]


@pytest.mark.parametrize("task", list_tasks(), ids=lambda task: task.name)
def test_data_of_a_task(task):
    stored = load_task_data(task, DataArguments())
    streamed = load_task_data(task, DataArguments(streaming=True))
    assert list(streamed["train"]) == stored["train"].to_list()
    assert streamed["test"].to_list() == stored["test"].to_list()


def test_a_folder_of_files(tmp_path):
    features = Features({"nested": {"text": Value("string")}, "label": ClassLabel(names=["bad", "good"])})
    rows = [{"nested": {"text": f"text {number}"}, "label": number % 2} for number in range(6)]
    for split in ("train", "validation"):
        Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / f"{split}.parquet"))
    columns = {"source_column": "nested.text", "target_column": "label"}
    asked = DataArguments(dataset_name=str(tmp_path), **columns, streaming=True, max_eval_samples=2)
    data = load_task_data(get_task("classification"), asked)
    assert [row["target"] for row in data["train"]] == ["bad", "good"] * 3
    assert data["validation"].to_list()[1] == {"source": "text 1", "target": "good"}
    columns["source_column"] = "nested.txt"
    asked = DataArguments(dataset_name=str(tmp_path), **columns, streaming=True)
    with pytest.raises(ValueError, match=r"no column 'nested.txt'.*Did you mean 'nested.text'\?"):
        load_task_data(get_task("classification"), asked)


@pytest.mark.parametrize("family", FAMILY_TYPES)
def test_the_first_step_needs_the_rows_of_the_buffer_alone(family, file, make_args, monkeypatch):
    read = []

    def counted(*args):
        for record in records(*args):
            read.append(record[0])
            yield record

    records = files.records
    monkeypatch.setattr(files, "records", counted)
    Path(file).write_text(Path(file).read_text() * 100)
    tokenizer, model = tiny_tokenizer(family), tiny_model(FAMILY_TYPES[family])
    data = DataArguments(train_file=file, streaming=True, shuffle_buffer_size=50, max_eval_samples=4)
    args = make_args(peft_method="lora", max_steps=2)
    rows = prepare_task_data(TASK, data, model, tokenizer, args)
    LeftTrainer(model, args, train_dataset=rows["train"], processing_class=tokenizer).train()
    assert max(read) < 3000
    sources = first_sources(rows["train"], 50)
    assert sources != sorted(sources, key=lambda source: int(source.split()[1]))


def test_a_stream_needs_a_number_of_steps(file, make_args):
    asked = DataArguments(train_file=file, streaming=True)
    with pytest.raises(ValueError, match=r"needs max_steps. Pass for example --max_steps 1000"):
        prepare_task_data(TASK, asked, tiny_model("t5"), tiny_tokenizer("encoder_decoder"), make_args(max_steps=-1))


def test_each_process_makes_its_batches_of_a_stream(make_args):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    args = make_args()
    assert with_own_batches(args, rows) is args
    assert with_own_batches(args, rows.to_iterable_dataset()).accelerator_config.dispatch_batches is False
    assert args.accelerator_config.dispatch_batches is None
    dispatched = make_args(accelerator_config={"dispatch_batches": True})
    assert with_own_batches(dispatched, rows.to_iterable_dataset()) is dispatched
