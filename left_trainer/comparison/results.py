"""What the cells of a comparison gave: `results.jsonl`, one line per run, and merging such files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from left_trainer.adapters.text_files import write_whole
from left_trainer.comparison.cell import BASE, CELL_FILE, FAILURE_FILE, Cell
from left_trainer.runs.json_records import from_json, json_lines, read_json, to_json
from left_trainer.runs.report import REPORT_FILE, TrainingReport
from left_trainer.tasks import get_task

logger = logging.getLogger(__name__)

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
        return cls(_checked(Cell.from_json(parts.cell)), report, parts.failure)


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
        return Result(_read_cell(folder), TrainingReport.read(folder))
    if (folder / FAILURE_FILE).is_file():
        return Result(_read_cell(folder), None, read_failure(folder))
    return None


def _read_cell(folder: Path) -> Cell:
    cell = Cell.read(folder)
    try:
        return _checked(cell)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(folder / CELL_FILE)!r} is not a cell of a comparison: {error}") from error


def _checked(cell: Cell) -> Cell:
    """`cell`, if it is one that can be shown. Raises `ValueError` otherwise."""
    get_task(cell.task)
    for name in ("base_model", "prompt", "data_sha256"):
        if not isinstance(cell.conditions.get(name), str):
            raise ValueError(f"the field 'conditions.{name}' must be a string, got {cell.conditions.get(name)!r}.")
    for name in ("max_new_tokens", "num_beams"):
        if not isinstance(cell.conditions.get(name), int | None):
            raise ValueError(f"the field 'conditions.{name}' must be an integer, got {cell.conditions.get(name)!r}.")
    if not isinstance(cell.arguments.get("seed", 0), int):
        raise ValueError(f"the field 'arguments.seed' must be an integer, got {cell.arguments['seed']!r}.")
    return cell


def read_failure(folder: Path) -> str:
    """Why the cell in `folder` failed."""
    path = folder / FAILURE_FILE
    try:
        return from_json(_FailureFile, read_json(path)).reason
    except ValueError as error:
        raise ValueError(f"{str(path)!r} does not say why a run failed: {error}") from error


def finished_cell(folder: Path) -> Result | None:
    """As `read_cell`; `None` also where a file in the folder is damaged, so that the run is done again."""
    try:
        return read_cell(folder)
    except (ValueError, OSError):
        return None


def read_cells(output_dir: Path) -> dict[str, Result]:
    """Every finished cell below `output_dir`, by its name. A damaged one is said and left out."""
    found = {}
    for folder in sorted((output_dir / CELLS).glob("*/")):
        try:
            result = read_cell(folder)
        except (ValueError, OSError) as error:
            logger.warning(
                "%s This run does not count. It is done again where the comparison has it; otherwise remove the folder "
                "%r. All other runs stay.",
                str(error).rstrip(".") + ".",
                str(folder),
            )
            continue
        if result is not None:
            found[result.cell.name] = result
    return found


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


def merge(folders: Sequence[Path], read: Callable[[Path], Sequence[Result]] = read_results) -> list[Result]:
    """The results of several folders. A copied run counts once, a failure only if the run never ended well.

    Args:
        folders: Of comparisons, from one or several machines.
        read: What reads a folder.

    Raises:
        FileNotFoundError, ValueError: As `read_results`.
        ValueError: The same run, measured twice.
    """
    found = [(result, folder) for folder in folders for result in read(folder)]
    finished = {result.cell.name for result, _ in found if result.report is not None}
    merged: dict[tuple[str | None, ...], tuple[Result, Path]] = {}
    for result, folder in found:
        if result.report is None and result.cell.name in finished:
            continue
        key: tuple[str | None, ...] = (result.cell.name,)
        if result.report is not None and result.cell.kind != BASE:  # the untrained model is one row
            key = (*key, result.report.machine, result.report.host)
        earlier, where = merged.setdefault(key, (result, folder))
        if result.report != earlier.report and result.cell.kind != BASE:
            raise ValueError(
                f"{result.cell.name} was measured twice on the same machine, with different figures in {str(where)!r} "
                f"and {str(folder)!r}. Leave out one of the two folders."
            )
    return [result for result, _ in merged.values()]


def are_shown(results: Iterable[Result]) -> bool:
    """Whether there is a row to show: trials of learning rates have none."""
    return any(result.cell.kind != "trial" for result in results)


def check_comparable(cells: Iterable[Cell]) -> None:
    """Raise `ValueError` unless all cells are of one model and, for each task, of the same data and settings.

    A setting that has a name may have a model of its own.
    """
    cells = list(cells)
    named = {cell.conditions.get("base_model") for cell in cells if cell.setting is not None}
    others = [cell for cell in cells if cell.setting is None]
    _check_same([cell for cell in others if not _is_base_of(cell, named)], MODEL, "The runs have")
    for task in dict.fromkeys(cell.task for cell in cells):
        _check_same([cell for cell in cells if cell.task == task], DATA, f"The task {task} has")


def _is_base_of(cell: Cell, models: Collection[Any]) -> bool:
    return cell.kind == BASE and cell.conditions.get("base_model") in models


def _check_same(cells: Sequence[Cell], conditions: Mapping[str, str], subject: str) -> None:
    for key, title in conditions.items():
        values = list(dict.fromkeys(cell.conditions.get(key) for cell in cells))
        if len(values) > 1:
            named = " Give a setting that has a model of its own a name." if conditions is MODEL else ""
            raise ValueError(
                f"{subject} different {title}: {_shorten(values[0])} and {_shorten(values[1])}. The scores would not "
                "be comparable. Use a separate --output_dir for each, or put them side by side on purpose: "
                f"`left-trainer report DIR DIR --allow_mixed`.{named}"
            )


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}..."
