"""A line that another package logs is hidden where our code asked for it, and nowhere else."""

from __future__ import annotations

import pytest
from datasets import Dataset
from trl.trainer import sft_trainer

from left_trainer import LeftTrainer
from tiny import FAMILY_TYPES, tiny_model, tiny_rows, tiny_tokenizer

LONG_ROW = {"prompt": "red blue " * 200, "completion": " green"}


def long_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if "Token indices" in message]


@pytest.mark.parametrize("family", FAMILY_TYPES)
def test_no_line_about_texts_that_we_cut(family, make_args, caplog):
    rows = Dataset.from_list([LONG_ROW, *(dict(row) for row in tiny_rows(3, 1))])
    tokenizer = tiny_tokenizer(family)
    LeftTrainer(tiny_model(FAMILY_TYPES[family]), make_args(), train_dataset=rows, processing_class=tokenizer)
    assert long_lines(caplog) == []


def test_a_user_who_calls_the_tokenizer_is_still_told(caplog):
    tiny_tokenizer("decoder_only")(LONG_ROW["prompt"])
    assert len(long_lines(caplog)) == 1


def test_lines_of_one_process_are_not_numbered(caplog):
    sft_trainer.logger.warning("what matters is still said")
    assert caplog.messages == ["what matters is still said"]
