"""The table of a comparison in the trackers that people keep their runs in."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from left_trainer.registry import did_you_mean

if TYPE_CHECKING:
    from left_trainer.comparison.rows import Summary

PROJECT, TABLE = "left-trainer", "comparison"


def check_trackers(names: Iterable[str]) -> None:
    """Raise `ValueError` for a name that is no tracker, `ImportError` for one that is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise ValueError(
                f"log_table={name!r} is not known.{did_you_mean(name, LOGGERS)} Expected {', '.join(LOGGERS)}."
            )
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"log_table={name!r} needs the package {name}: pip install {name}.")


def log_table(names: Iterable[str], summary: Summary, folder: Path) -> None:
    """Log a comparison, one row for each method on each task.

    Args:
        names: Checked. How trackers are reached, or that they are offline, say their own settings, such as `WANDB_MODE`
            and `WANDB_PROJECT`.
        summary: Of the comparison.
        folder: Of the comparison, for what a tracker keeps in files.
    """
    for name in dict.fromkeys(names):
        LOGGERS[name](summary, folder)


def _to_tensorboard(summary: Summary, folder: Path) -> None:
    """The table as text, and each row as one of the tab HPARAMS."""
    from torch.utils.tensorboard import SummaryWriter

    from left_trainer.comparison.tables import markdown

    with SummaryWriter(log_dir=folder / "tensorboard") as writer:
        writer.add_text(TABLE, markdown(summary))
        for row in summary.rows:
            figures = {key: value for key, value in row.values.items() if isinstance(value, int | float)}
            scores = {name: score.mean for name, score in row.metrics.items() if score.mean is not None}
            run_name = str(summary.rows.index(row))
            writer.add_hparams({"task": row.task, "method": row.method}, {**figures, **scores}, run_name=run_name)


def _to_wandb(summary: Summary, folder: Path) -> None:
    import wandb

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    with wandb.init(project=project, name=summary.title, dir=folder, job_type=TABLE) as run:
        run.log({TABLE: wandb.Table(*_columns_and_rows(summary))})


def _to_trackio(summary: Summary, folder: Path) -> None:
    import trackio

    trackio.init(project=PROJECT, name=summary.title)
    trackio.log({TABLE: trackio.Table(*_columns_and_rows(summary))})
    trackio.finish()


def _columns_and_rows(summary: Summary) -> tuple[list[Any], list[list[Any]]]:
    """Of the CSV file, with nothing where there is no figure: a column has one type."""
    from left_trainer.comparison.tables import table_of

    columns, *rows = table_of(summary)
    return columns, [[None if value == "" else value for value in row] for row in rows]


LOGGERS: dict[str, Callable[[Summary, Path], None]] = {
    "tensorboard": _to_tensorboard,
    "trackio": _to_trackio,
    "wandb": _to_wandb,
}
