"""Whatever a user passes as a dataset trains as the plain form does, or is refused in one sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import BatchEncoding

from left_trainer import LeftTrainer
from left_trainer.data.dataset_types import as_dataset, is_lazy
from left_trainer.models import FAMILIES
from log_history import losses
from tiny import FAMILY_TYPES, tiny_model, tiny_rows

TEXT = tiny_rows(8)


class Rows(torch.utils.data.Dataset):
    """Rows as a user of torch keeps them."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        yield from self.rows


def tensors(row):
    return {name: torch.tensor(value) for name, value in row.items()}


def arrays(row):
    return {name: np.array(value) for name, value in row.items()}


def tokenized_when_read(rows):
    """Rows of texts whose tokens a transform makes, as `set_transform` has it."""
    by_prompt = {text["prompt"]: row for text, row in zip(TEXT, rows, strict=True)}

    def transform(batch):
        chosen = [by_prompt[prompt] for prompt in batch["prompt"]]
        return {"input_ids": [row["input_ids"] for row in chosen], "labels": [row["labels"] for row in chosen]}

    texts = [{**text, "number": number} for number, text in enumerate(TEXT)]
    return Dataset.from_list(texts).with_transform(transform)


# From rows of text, and from rows of tokens.
TEXT_FORMS = {
    "list": list,
    "tuple": tuple,
    "batch_encodings": lambda rows: [BatchEncoding(row) for row in rows],
    "stream": Stream,
    "streamed_dataset": lambda rows: IterableDataset.from_generator(lambda: iter(rows)),
    "numpy_format": lambda rows: Dataset.from_list(rows).with_format("numpy"),
}
TOKEN_FORMS = {
    "list": list,
    "list_of_arrays": lambda rows: [arrays(row) for row in rows],
    "torch": Rows,
    "torch_of_tensors": lambda rows: Rows([tensors(row) for row in rows]),
    "torch_subset": lambda rows: torch.utils.data.Subset(Rows(rows), range(len(rows))),
    "stream_of_tensors": lambda rows: Stream([tensors(row) for row in rows]),
    "torch_format": lambda rows: Dataset.from_list(rows).with_format("torch"),
    "numpy_format": lambda rows: Dataset.from_list(rows).with_format("numpy"),
    "some_columns": lambda rows: Dataset.from_list([{**row, "note": "x"} for row in rows]).with_format(
        "torch", columns=["input_ids", "labels"]
    ),
    "transform": tokenized_when_read,
}


@pytest.fixture
def trained(make_args, tokenizers, tmp_path):
    """Losses of a short training on rows."""

    def train(family, rows):
        args = make_args(
            max_steps=2,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=4,
            overwrite_output_dir=True,
        )
        options = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizers[family]}
        trainer = LeftTrainer(tiny_model(FAMILY_TYPES[family]), args, **options)
        trainer.train()
        return [*losses(trainer), trainer.evaluate()["eval_loss"], trainer.evaluate(rows)["eval_loss"]]

    return train


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_trains_as_a_dataset_does(family, trained, make_args, tokenizers):
    plain = Dataset.from_list(TEXT)
    expected = trained(family, plain)
    trainer = LeftTrainer(
        tiny_model(FAMILY_TYPES[family]), make_args(), train_dataset=plain, processing_class=tokenizers[family]
    )
    tokens = trainer.train_dataset.select_columns(["input_ids", "labels"]).to_list()
    for name, form in TEXT_FORMS.items():
        assert trained(family, form(TEXT)) == pytest.approx(expected, abs=1e-6), f"text as {name}"
    for name, form in TOKEN_FORMS.items():
        assert trained(family, form(tokens)) == pytest.approx(expected, abs=1e-6), f"tokens as {name}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (DatasetDict(train=Dataset.from_list(TEXT)), ValueError, r"is a DatasetDict .*train_dataset=data\['train'\]"),
        ({"train": Dataset.from_list(TEXT)}, ValueError, "is a dict with the keys 'train'"),
        ([1, 2], TypeError, "A row of train_dataset is a int. Rows must be dicts"),
        (Rows([(1, 2)]), TypeError, "A row of train_dataset is a tuple"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": 1, "completion": "b"}], ValueError, "form no table"),
        (7, TypeError, "train_dataset is a int. Pass a datasets.Dataset"),
        ([], ValueError, "train_dataset is empty"),
        (Rows(TEXT), ValueError, r"computes its rows when they are read.*'prompt', 'completion'.*from_list"),
        (Dataset.from_list(TEXT).with_transform(lambda batch: batch), ValueError, "computes its rows when they are"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_train_is_refused(rows, error, message, family, make_args, saved_models, no_weights):
    with pytest.raises(error, match=message) as caught:
        LeftTrainer(str(saved_models[family]), make_args(), train_dataset=rows)
    assert "\n" not in str(caught.value)


def test_rows_of_torch_are_read_when_they_are_needed():
    dataset = as_dataset(Rows([{"input_ids": [1], "labels": [number]} for number in range(3)]), "train_dataset")
    assert is_lazy(dataset)
    assert [row["labels"] for row in dataset] == [[0], [1], [2]]
