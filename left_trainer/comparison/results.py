"""What the cells of a comparison gave: `results.jsonl`, one line per run, and merging such files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from left_trainer.comparison.cell import CELL_FILE, FAILURE_FILE, Cell
from left_trainer.runs.report import REPORT_FILE, write_whole

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
    report: Mapping[str, Any] | None
    failure: str | None = None


def read_cell(folder: Path) -> Result | None:
    """The result in a cell's folder; `None` where the cell was not run to its end."""
    for file in (REPORT_FILE, FAILURE_FILE):
        if (folder / CELL_FILE).is_file() and (folder / file).is_file():
            content = json.loads((folder / file).read_text(encoding="utf-8"))
            cell = Cell.read(folder)
            return Result(cell, None, content["reason"]) if file == FAILURE_FILE else Result(cell, content)
    return None


def read_cells(output_dir: Path) -> dict[str, Result]:
    """Every finished cell below `output_dir`, by its name."""
    folders = sorted((output_dir / CELLS).glob("*/"))
    found = {folder.name: read_cell(folder) for folder in folders}
    return {name: result for name, result in found.items() if result is not None}


def write_results(results: Iterable[Result], output_dir: Path) -> None:
    """One JSON line per result; the file appears whole or not at all."""
    lines = [json.dumps(asdict(result), ensure_ascii=False) for result in results]
    write_whole(output_dir / RESULTS_FILE, "".join(line + "\n" for line in lines))


def read_results(folder: Path) -> list[Result]:
    """The lines of a folder's `results.jsonl`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A line that no comparison wrote.
    """
    file = folder / RESULTS_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} has no {RESULTS_FILE}. Pass an output folder of `left-trainer compare`."
        )
    results = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            content = json.loads(line)
            results.append(Result(Cell(**content["cell"]), content["report"], content["failure"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"Line {number} of {str(file)!r} is no result of a comparison: {error}") from error
    return results


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
        key = (result.cell.name, result.report["machine"] if result.report else None)
        earlier, where = merged.setdefault(key, (result, folder))
        if result.report != earlier.report and result.cell.kind != "base":
            raise ValueError(
                f"{result.cell.name} is in {str(where)!r} and, with other figures, in {str(folder)!r}, both from the "
                "same machine. Leave one of the two folders out."
            )
    return [result for result, _ in merged.values()]


def check_comparable(cells: Iterable[Cell]) -> None:
    """Raise `ValueError` unless all cells are of one model and, for each task, of the same data and settings."""
    cells = list(cells)
    _check_same(cells, MODEL, "This is about")
    for task in dict.fromkeys(cell.task for cell in cells):
        _check_same([cell for cell in cells if cell.task == task], DATA, f"The task {task} has")


def _check_same(cells: Sequence[Cell], conditions: Mapping[str, str], subject: str) -> None:
    for key, title in conditions.items():
        values = list(dict.fromkeys(cell.conditions[key] for cell in cells))
        if len(values) > 1:
            raise ValueError(
                f"{subject} different {title}: {_shorten(values[0])} and {_shorten(values[1])}. Such scores do not "
                "belong in one table. Compare them in folders of their own, --output_dir; to have them side by side "
                "nevertheless, pass the folders to `left-trainer report --allow_mixed`."
            )


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}..."
