"""Tokens and labels of decoder-only models: those of TRL, made in batches."""

from __future__ import annotations

import logging

import pytest
from datasets import Dataset, IterableDataset
from trl import SFTConfig, SFTTrainer

from left_trainer import LeftTrainer
from left_trainer.data import texts
from tiny import tiny_model, tiny_rows, tiny_tokenizer

PAIRS = [
    *tiny_rows(6),
    {"prompt": "ends already", "completion": " so</s>"},
    {"prompt": "a space ", "completion": " merges"},
    {"prompt": "re", "completion": "d and so on"},
    {"prompt": "", "completion": "no prompt"},
]
TEXTS = [{"text": row["prompt"] + row["completion"]} for row in PAIRS]


def features(trainer) -> list[dict]:
    return [{name: list(row[name]) for name in ("input_ids", "labels")} for row in trainer.train_dataset]


@pytest.mark.parametrize("kind", [Dataset, IterableDataset])
@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (PAIRS, {}),
        (PAIRS, {"completion_only_loss": True}),
        (PAIRS, {"completion_only_loss": False}),
        (PAIRS, {"max_length": 12}),
        (PAIRS, {"max_length": 12, "truncation_mode": "keep_end"}),
        (PAIRS, {"packing": True, "max_length": 32}),
        (TEXTS, {}),
        (TEXTS, {"max_length": 12}),
        ([{"body": row["text"]} for row in TEXTS], {"dataset_text_field": "body"}),
        ([{**row, "other": 1, "messages": None} for row in PAIRS], {}),
    ],
)
def test_as_trl(rows, options, kind, make_args, tmp_path):
    def dataset():
        stored = Dataset.from_list(rows)
        return stored if kind is Dataset else stored.to_iterable_dataset()

    plain_rows = dataset().remove_columns(["messages"]) if "messages" in rows[0] else dataset()
    config = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_steps=1, **options)
    plain = SFTTrainer(tiny_model("llama"), config, None, plain_rows, processing_class=tiny_tokenizer("decoder_only"))
    args = make_args(peft_method="lora", max_steps=1, **options)
    ours = LeftTrainer(
        tiny_model("llama"), args, train_dataset=dataset(), processing_class=tiny_tokenizer("decoder_only")
    )
    assert features(ours) == features(plain)


def test_a_merge_is_said_once(make_args, caplog):
    texts._warn_of_merge.cache_clear()
    rows = Dataset.from_list([{"prompt": "so", "completion": " on"}, {"prompt": "a", "completion": "nd so"}] * 2)
    with caplog.at_level(logging.WARNING):
        LeftTrainer(
            tiny_model("llama"),
            make_args(peft_method="lora"),
            train_dataset=rows,
            processing_class=tiny_tokenizer("decoder_only"),
        )
    assert caplog.text.count("The tokens of a prompt are not those") == 1
