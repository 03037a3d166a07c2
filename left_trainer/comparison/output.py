"""What a comparison leaves in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from left_trainer.comparison.page import write_page
from left_trainer.comparison.plots import draw_plots
from left_trainer.comparison.results import Result, write_results
from left_trainer.comparison.rows import Summary
from left_trainer.comparison.summary import summarize
from left_trainer.comparison.tables import latex, markdown, to_csv


def write_outputs(
    results: Sequence[Result], folder: Path, title: str = "", command: str = "", plots: bool = True
) -> Summary:
    """Write `results.jsonl`, the tables, `index.html` and, if asked for, the plots. Returns the summary.

    Args:
        results: Of comparable runs.
        folder: Is made if it does not exist.
        title: Of tables and page.
        command: That made the results.
        plots: Draw the PNG files, which takes a second or two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_results(results, folder)
    summary = summarize(results, title, command)
    for name, text in (("table.md", markdown(summary)), ("table.csv", to_csv(summary)), ("table.tex", latex(summary))):
        (folder / name).write_text(text, encoding="utf-8")
    write_page(summary.to_json(), folder / "index.html")
    if plots:
        draw_plots(summary, folder)
    return summary
