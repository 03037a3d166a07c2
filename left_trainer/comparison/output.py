"""What a comparison leaves in its folder."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from left_trainer.adapters.text_files import write_whole
from left_trainer.comparison.cell import PREDICTIONS_FILE
from left_trainer.comparison.page import write_page
from left_trainer.comparison.plots import draw_plots
from left_trainer.comparison.results import CELLS, Result, write_results
from left_trainer.comparison.rows import Summary
from left_trainer.comparison.summary import summarize
from left_trainer.comparison.tables import latex, markdown, to_csv
from left_trainer.storage.errors import write_errors
from left_trainer.storage.whole import whole_file


def write_outputs(
    results: Sequence[Result], folder: Path, title: str = "", command: str = "", plots: bool = True
) -> Summary:
    """Write the tables, `index.html`, if asked for the plots, and `results.jsonl`. Returns the summary.

    Args:
        results: Of comparable runs.
        folder: Is made if it does not exist.
        title: Of tables and page.
        command: That made the results.
        plots: Draw the PNG files, which takes a second or two.
    """
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    summary = summarize(results, title, command, predictions_of(results, folder))
    for name, text in (("table.md", markdown(summary)), ("table.csv", to_csv(summary)), ("table.tex", latex(summary))):
        write_whole(folder / name, text)
    write_page(summary.to_json(), folder / "index.html")
    if plots:
        draw_plots(summary, folder)
    # Last: a folder with results is finished, and `report` refuses to write over it.
    write_results(results, folder)
    return summary


def predictions_of(results: Sequence[Result], folder: Path) -> dict[str, str]:
    """Where the predictions of each cell are, below `folder`, by the cell's name.

    A cell that was run on several machines has several predictions and one place; none of them is named.
    """
    names = Counter(result.cell.name for result in results)
    places = {name: PurePosixPath(CELLS, name, PREDICTIONS_FILE) for name, number in names.items() if number == 1}
    return {name: str(place) for name, place in places.items() if (folder / place).is_file()}


def copy_predictions(folders: Sequence[Path], results: Sequence[Result], folder: Path) -> None:
    """Copy the predictions of merged results from their `folders` to where the page in `folder` finds them."""
    for source in folders:
        for place in predictions_of(results, source).values():
            if source != folder:
                with write_errors(folder / place):
                    (folder / place).parent.mkdir(parents=True, exist_ok=True)
                    with whole_file(folder / place, (source / place).stat().st_size) as part:
                        shutil.copyfile(source / place, part)
