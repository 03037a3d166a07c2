"""What the terminal shows while a comparison runs: updated in place for people, plain lines for files."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from left_trainer.cli import run_display
from left_trainer.cli.run_display import RunDisplay

LOG = Path("outputs/compare/cells/x/log.txt")


class Terminal(io.StringIO):
    """A stream that takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO) -> str:
    with RunDisplay(2, stream) as display:
        for doing in ("starting", "step 1 of 9", "step 2 of 9"):
            display.progress("summarization, lora, seed 42", doing, LOG)
        display.result("summarization, lora, seed 42", "summarization, lora, seed 42: rougeL 50.0")
        display.add("one more")
        display.result("summarization, ia3, seed 42", None)
    return stream.getvalue()


def test_a_terminal_shows_run_step_and_log_in_place(capsys, monkeypatch):
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    shown = run(Terminal())
    assert "summarization, lora, seed 42: step 2 of 9" in shown
    assert f"log {LOG}" in shown
    assert "\r" in shown
    assert capsys.readouterr().out.splitlines() == ["[1/2] summarization, lora, seed 42: rougeL 50.0", "[1/3] one more"]


@pytest.mark.parametrize(("quiet_seconds", "steps"), [(3600, 0), (0, 2)])
def test_elsewhere_lines_stay_and_are_few(quiet_seconds, steps, monkeypatch, capsys):
    monkeypatch.setattr(run_display, "QUIET_SECONDS", quiet_seconds)
    lines = run(io.StringIO()).splitlines()
    assert lines[0] == f"[1/2] summarization, lora, seed 42: started, log {LOG}"
    assert len(lines) == 1 + steps
    assert not any("\r" in line for line in lines)
    assert "rougeL 50.0" in capsys.readouterr().out
