"""What other packages log is what our filter knows."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from accelerate import PartialState
from trl.trainer import sft_trainer

from left_trainer.models.upstream_logs import HIDDEN, NUMBER, NUMBERED, UpstreamFilter
from package_walk import home
from tiny import tiny_tokenizer


@pytest.fixture
def unfiltered() -> Iterator[None]:
    """Loggers as they are without our filter."""
    loggers = {name: list(logging.getLogger(name).filters) for name in (*HIDDEN, *NUMBERED)}
    for name, filters in loggers.items():
        assert any(isinstance(item, UpstreamFilter) for item in filters)
        logging.getLogger(name).filters = []
    yield
    for name, filters in loggers.items():
        logging.getLogger(name).filters = filters


@pytest.mark.usefixtures("unfiltered")
def test_a_text_that_is_too_long_is_warned_of_by_the_tokenizer(caplog):
    tiny_tokenizer("decoder_only")("red blue " * 200)
    (record,) = [record for record in caplog.records if record.name in HIDDEN]
    assert HIDDEN[record.name].match(record.getMessage()), (
        f"transformers words its line about long texts differently: change it in {home('UpstreamFilter')}."
    )


@pytest.mark.usefixtures("unfiltered")
def test_lines_of_trl_carry_the_number_of_the_process(caplog):
    PartialState()
    assert sft_trainer.logger.logger.name in NUMBERED
    sft_trainer.logger.warning("a line")
    assert NUMBER.match(caplog.messages[-1]), (
        f"accelerate no longer numbers lines where there is one process: remove NUMBERED from {home('UpstreamFilter')}."
    )
