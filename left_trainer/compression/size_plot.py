"""The picture of a run that shrinks: quality against parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from left_trainer.storage.whole import whole_file


def draw_sizes(points: Sequence[tuple[int, float]], score: str, path: Path) -> None:
    """Draw a score over the number of parameters to a PNG file.

    Args:
        points: Parameters and score of each size.
        score: Its name.
        path: The file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ordered = sorted(points)
    axes.plot(*zip(*ordered, strict=True), "o-", markersize=4)
    for parameters, value in ordered:
        axes.annotate(
            f"{value:.3g}", (parameters, value), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8
        )
    axes.set(xlabel="parameters apart from embeddings and output head")
    axes.set_ylabel(score, parse_math=False)
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as part:
        figure.savefig(part, dpi=120, format="png")
