"""Lines that other packages log while our code calls them: those that say nothing to a user are not shown."""

from __future__ import annotations

import inspect
import logging
import re

from accelerate.state import PartialState

# What is not shown, by the logger that says it.
HIDDEN = {
    # Our own features are cut where the model ends, and the rows that are cut are counted.
    "transformers.tokenization_utils_base": re.compile("Token indices sequence length is longer than"),
}
# Loggers that put the number of their process before each line, which says nothing where there is one process.
NUMBERED = ("trl.trainer.sft_trainer", "trl.trainer.utils")
NUMBER = re.compile(r"^\[RANK \d+\] ")
PACKAGE = __name__.partition(".")[0]


def tidy_upstream_logs() -> None:
    """Filter what other packages log; nothing happens the second time."""
    for name in (*HIDDEN, *NUMBERED):
        logger = logging.getLogger(name)
        if not any(isinstance(item, UpstreamFilter) for item in logger.filters):
            logger.addFilter(UpstreamFilter())


class UpstreamFilter(logging.Filter):
    """Hides and shortens lines of `HIDDEN` and `NUMBERED`, and none that another program asks for.

    A user who calls a tokenizer is told that the text is too long. Where our code calls it, the text is cut.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is shown."""
        if record.name in NUMBERED and PartialState().num_processes == 1:
            record.msg = NUMBER.sub("", str(record.msg))
        hidden = HIDDEN.get(record.name)
        return not (hidden and hidden.match(record.getMessage()) and _is_called_by_us())


def _is_called_by_us() -> bool:
    """Whether a module of ours, this one left out, is among those that are running."""
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(f"{PACKAGE}.") and name != __name__:
            return True
        frame = frame.f_back
    return False
