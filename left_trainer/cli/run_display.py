"""What the terminal shows of a comparison while it runs: updated lines, or plain ones where nobody watches."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from left_trainer.shown_text import printable

QUIET_SECONDS = 30  # between two lines of one run where they stay


class RunDisplay:
    """Runs that are finished stay as lines on stdout. What runs now is shown on `stream`.

    On a terminal, that is a bar over all runs, and below it each run's name, step and log, updated in place. Elsewhere
    it is a line when a run starts, with the path of its log, and a line with its step twice a minute.

    Args:
        total: Number of runs.
        stream: By default stderr.
    """

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        from tqdm import tqdm

        self.stream = stream or sys.stderr
        self.is_live = self.stream.isatty()
        self.total, self.finished = total, 0
        self._running: dict[str, tuple[str, Path]] = {}
        self._said: dict[str, float] = {}
        self._lock = threading.Lock()
        options: dict[str, Any] = {"file": self.stream, "dynamic_ncols": True, "disable": not self.is_live}
        self._bar = tqdm(total=total, desc="runs", unit="run", smoothing=0.1, position=0, **options)
        self._lines = [
            tqdm(total=0, bar_format="{desc}", position=1 + number, leave=False, **options) for number in range(2)
        ]

    def __enter__(self) -> RunDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        for line in (*reversed(self._lines), self._bar):
            line.close()

    def progress(self, title: str, doing: str, log: Path) -> None:
        """Say what a run is doing; may be called from any thread.

        Args:
            title: Of the run.
            doing: Such as `step 10 of 100`.
            log: Where its output goes.
        """
        with self._lock:
            is_new = title not in self._running
            self._running[title] = doing, log
            if self.is_live:
                self._redraw()
            elif is_new:
                self._say(title, f"started, log {log}")
            elif time.monotonic() - self._said[title] >= QUIET_SECONDS:
                self._say(title, doing)

    def result(self, title: str, text: str | None) -> None:
        """Count a run as finished.

        Args:
            title: Of the run.
            text: The line that stays; `None` for a run that had been finished earlier.
        """
        with self._lock:
            self.finished += 1
            self._running.pop(title, None)
            if text is not None:
                self._write(text)
            self._bar.update()
            self._redraw()

    def add(self, text: str) -> None:
        """Count one run more than was known, and say why."""
        with self._lock:
            self.total += 1
            self._bar.total = self.total
            self._write(text)

    def _write(self, text: str) -> None:
        """Print a line that stays."""
        with self._bar.external_write_mode(file=sys.stdout):
            print(printable(f"[{self.finished}/{self.total}] {text}"), flush=True)

    def _say(self, title: str, text: str) -> None:
        self._said[title] = time.monotonic()
        print(f"[{self.finished + 1}/{self.total}] {title}: {text}", file=self.stream, flush=True)

    def _redraw(self) -> None:
        running = self._running.items()
        texts = (
            "; ".join(f"{title}: {doing}" for title, (doing, _) in running),
            "; ".join(f"log {log}" for _, (_, log) in running),
        )
        for line, text in zip(self._lines, texts, strict=True):
            line.set_description_str(text)
