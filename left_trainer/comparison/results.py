"""What the cells of a comparison gave: `results.jsonl`, one line per run, and merging such files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from left_trainer.adapters.text_files import write_whole
from left_trainer.comparison.cell import BASE, CELL_FILE, FAILURE_FILE, Cell
from left_trainer.runs.json_records import from_json, json_lines, read_json, to_json
from left_trainer.runs.report import REPORT_FILE, TrainingReport

RESULTS_FILE = "results.jsonl"
CELLS = "cells"
SHOWN_LENGTH = 40
# What has to be equal for scores to be comparable, as it is called in an error: everywhere, and on each task.
MODEL = {"base_model": "models"}
DATA = {"data_sha256": "data", "prompt": "prompts", "max_new_tokens": "length limits", "num_beams": "numbers of beams"}


@dataclass(frozen=True)
class Result:
    """A finished cell: its report, or the reason of its failure."""

    cell: Cell
    report: TrainingReport | None
    failure: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        report = self.report.to_json() if self.report else None
        return {"cell": to_json(self.cell), "report": report, "failure": self.failure}

    @classmethod
    def from_json(cls, content: Any) -> Result:
        """From JSON values, those of version 0.1 included. Raises `ValueError` as `TrainingReport.from_json` does."""
        parts = from_json(_ResultParts, content)
        report = TrainingReport.from_json(parts.report) if parts.report is not None else None
        return cls(Cell.from_json(parts.cell), report, parts.failure)


@dataclass(frozen=True)
class _ResultParts:
    cell: Mapping[str, Any]
    report: Mapping[str, Any] | None
    failure: str | None


@dataclass(frozen=True)
class _FailureFile:
    reason: str


def read_cell(folder: Path) -> Result | None:
    """The result in a cell's folder; `None` where the cell was not run to its end.

    Raises:
        ValueError: A file that no comparison wrote; the message names file and field.
    """
    if not (folder / CELL_FILE).is_file():
        return None
    if (folder / REPORT_FILE).is_file():
        return Result(Cell.read(folder), TrainingReport.read(folder))
    if (folder / FAILURE_FILE).is_file():
        return Result(Cell.read(folder), None, read_failure(folder))
    return None


def read_failure(folder: Path) -> str:
    """Why the cell in `folder` failed."""
    path = folder / FAILURE_FILE
    try:
        return from_json(_FailureFile, read_json(path)).reason
    except ValueError as error:
        raise ValueError(f"{str(path)!r} does not say why a run failed: {error}") from error


def read_cells(output_dir: Path) -> dict[str, Result]:
    """Every finished cell below `output_dir`, by its name."""
    folders = sorted((output_dir / CELLS).glob("*/"))
    found = (read_cell(folder) for folder in folders)
    return {result.cell.name: result for result in found if result is not None}


def write_results(results: Iterable[Result], output_dir: Path) -> None:
    """One JSON line per result; the file appears whole or not at all."""
    lines = [json.dumps(result.to_json(), ensure_ascii=False, allow_nan=False) for result in results]
    write_whole(output_dir / RESULTS_FILE, "".join(line + "\n" for line in lines))


def read_results(folder: Path) -> list[Result]:
    """The lines of a folder's `results.jsonl`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A line that no comparison wrote; the message names the line and the field.
    """
    file = folder / RESULTS_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} has no {RESULTS_FILE}. Pass an output folder of `left-trainer compare`."
        )
    results = []
    for number, line in json_lines(_text(file)):
        try:
            results.append(Result.from_json(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"Line {number} of {str(file)!r} is not a result of a comparison: {error}") from error
    return results


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not a file of results: {error}.") from error


def merge(folders: Sequence[Path]) -> list[Result]:
    """The results of several folders. A copied run counts once, a failure only if the run never ended well.

    Raises:
        FileNotFoundError, ValueError: As `read_results`.
        ValueError: The same run, measured twice.
    """
    found = [(result, folder) for folder in folders for result in read_results(folder)]
    finished = {result.cell.name for result, _ in found if result.report is not None}
    merged: dict[tuple[str, str | None], tuple[Result, Path]] = {}
    for result, folder in found:
        if result.report is None and result.cell.name in finished:
            continue
        key = (result.cell.name, result.report.machine if result.report else None)
        earlier, where = merged.setdefault(key, (result, folder))
        if result.report != earlier.report and result.cell.kind != BASE:
            raise ValueError(
                f"{result.cell.name} was measured twice on the same machine, with different figures in {str(where)!r} "
                f"and {str(folder)!r}. Leave out one of the two folders."
            )
    return [result for result, _ in merged.values()]


def check_comparable(cells: Iterable[Cell]) -> None:
    """Raise `ValueError` unless all cells are of one model and, for each task, of the same data and settings."""
    cells = list(cells)
    _check_same(cells, MODEL, "The runs have")
    for task in dict.fromkeys(cell.task for cell in cells):
        _check_same([cell for cell in cells if cell.task == task], DATA, f"The task {task} has")


def _check_same(cells: Sequence[Cell], conditions: Mapping[str, str], subject: str) -> None:
    for key, title in conditions.items():
        values = list(dict.fromkeys(cell.conditions[key] for cell in cells))
        if len(values) > 1:
            raise ValueError(
                f"{subject} different {title}: {_shorten(values[0])} and {_shorten(values[1])}. The scores would not "
                "be comparable. Use a separate --output_dir for each, or put them side by side on purpose: "
                "`left-trainer report DIR DIR --allow_mixed`."
            )


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}..."
