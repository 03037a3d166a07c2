"""The pictures of a comparison: quality against memory, parameters, size and speed, and training curves."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from left_trainer.comparison.cell import BASE
from left_trainer.comparison.rows import Row, Summary, TaskSummary
from left_trainer.shown_text import shorten
from left_trainer.storage.whole import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 1024**2
SIZE = "base_parameters"
COLORS = {
    "soft_prompt": "#0072b2",
    "additive": "#d55e00",
    "reparameterization": "#009e73",
    "selective": "#8a5a9e",
}
LINES = ("-", "--", ":", "-.")
PANEL = (5.2, 3.6)  # inches
LABEL_START = 1.03  # of the width of the axes
LABEL_GAP = 0.065  # of the height of the axes
LABEL_HEIGHT = 0.19  # inches
N_COLUMNS = 2
LONGEST_LABEL = 40  # characters; a longer one leaves no room for the axes
MAX_LABELS = 70  # in a panel, so that each method has one; more take seconds to draw and nobody reads them


@dataclass(frozen=True)
class Cost:
    """What quality is drawn against: a column, how it is written on the axis, and by what it is divided.

    `is_gain` where more of it is better, and `of_sizes` where it is drawn of models of several sizes only.
    """

    key: str
    title: str
    divisor: float = 1
    is_logarithmic: bool = False
    is_gain: bool = False
    of_sizes: bool = False


COSTS = {
    "quality_memory": Cost("peak_memory_train_bytes", "peak memory in training (MiB)", MIB),
    "quality_parameters": Cost("trainable_parameters", "trainable parameters", is_logarithmic=True),
    "quality_size": Cost(SIZE, "parameters without embeddings and head", of_sizes=True),
    "quality_speed": Cost(
        "generation_samples_per_second", "generated rows a second (higher is better)", is_gain=True, of_sizes=True
    ),
}


def draw_plots(summary: Summary, folder: Path) -> None:
    """Write a picture for each of `COSTS` and `training_curves.png`, with a panel for each task."""
    if all(row.is_reference for row in summary.rows):
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")  # a name may be in any script
        _draw_plots(summary, folder)


def _draw_plots(summary: Summary, folder: Path) -> None:
    from matplotlib.ticker import EngFormatter

    has_sizes = any(column.key == SIZE for column in summary.columns)
    for name, cost in ((name, cost) for name, cost in COSTS.items() if has_sizes or not cost.of_sizes):
        figure, panels = _panels(summary)
        for task, axes in panels:
            better = "lower is better" if task.main_metric in task.lower_is_better else "higher is better"
            axes.set_xlabel(cost.title)
            if cost.key == SIZE:
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 600k; a power of ten would lie on the title
            axes.set_ylabel(f"{task.main_metric} ({better})", parse_math=False)
            axes.set_title(task.name, parse_math=False)
            axes.margins(x=0.1, y=0.1)
            _reference_lines(axes, summary, task)
            _scatter(axes, _trained(summary, task), task, cost)
        _save(figure, folder / f"{name}.png")
    figure, panels = _panels(summary)
    for task, axes in panels:
        _curves(axes, _trained(summary, task))
        axes.set(xlabel="optimizer step", ylabel="training loss (nats per target token)")
        axes.set_title(task.name, parse_math=False)
    _save(figure, folder / "training_curves.png")


def _trained(summary: Summary, task: TaskSummary) -> list[Row]:
    return [row for row in summary.rows_of(task) if not row.is_reference]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats: one that costs no more and scores no less, and is not equal.

    Args:
        points: Pairs of a cost, of which less is better, and a score, of which more is better.

    Returns:
        Indices, by rising cost.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1])):
        if not front or points[index][1] > points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def _panels(summary: Summary) -> tuple[Figure, list[tuple[TaskSummary, Axes]]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_tasks = len(summary.tasks)
    n_columns = min(N_COLUMNS, n_tasks)
    n_rows = -(-n_tasks // n_columns)
    n_labels = min(MAX_LABELS, max(len(_trained(summary, task)) for task in summary.tasks))
    height = max(PANEL[1], LABEL_HEIGHT * n_labels)
    figure = Figure(figsize=(PANEL[0] * n_columns, height * n_rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(n_rows, n_columns, number) for number in range(1, n_tasks + 1)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(zip(summary.tasks, panels, strict=True))


def _scatter(axes: Axes, rows: Sequence[Row], task: TaskSummary, cost: Cost) -> None:
    """Rows as points coloured by family, with their names; the Pareto front is a line, what it beats is paler."""
    from matplotlib.colors import to_rgba

    points, drawn = [], []
    sign = -1 if task.main_metric in task.lower_is_better else 1
    for row in rows:
        value, score = row.values[cost.key], row.metrics.get(task.main_metric)
        if isinstance(value, (int, float)) and value and score and score.mean is not None:
            points.append((value / cost.divisor, score.mean))
            drawn.append(row)
    if not drawn:
        return
    front = pareto_front([(-value if cost.is_gain else value, sign * mean) for value, mean in points])
    where: Literal["pre", "post"] = "pre" if cost.is_gain else "post"  # nothing is drawn that no point reaches
    steps = sorted(points[index] for index in front)
    axes.step(*zip(*steps, strict=True), where=where, color="#555555", linewidth=1.2)
    colors = [
        to_rgba(COLORS.get(row.family, "#333333"), 1.0 if index in front else 0.55) for index, row in enumerate(drawn)
    ]
    xs_drawn, ys_drawn = zip(*points, strict=True)
    axes.scatter(xs_drawn, ys_drawn, c=colors, zorder=3)
    intervals = [
        (x, score.low, score.high, color)
        for (x, _), color, score in zip(points, colors, (row.metrics[task.main_metric] for row in drawn), strict=True)
        if score.low is not None and score.high is not None
    ]
    if intervals:
        xs, lows, highs, shades = zip(*intervals, strict=True)
        axes.vlines(xs, lows, highs, colors=shades, linewidth=1)
    if cost.is_logarithmic:
        axes.set_xscale("log")
    first = [*front, *(index for index in range(len(drawn)) if index not in front)][:MAX_LABELS]  # rows are by quality
    _place_labels(axes, [drawn[index].method for index in first], [points[index] for index in first], len(drawn))


def _place_labels(axes: Axes, names: Sequence[str], points: Sequence[tuple[float, float]], n_drawn: int) -> None:
    """Names in a column beside the axes, in the order of the points' heights, each with a line to its point.

    Below the axes stands how many of the `n_drawn` have no name.
    """
    from matplotlib.collections import LineCollection

    order = sorted(range(len(points)), key=lambda index: points[index][::-1])
    lowest, highest = axes.get_ylim()
    heights = [(points[index][1] - lowest) / (highest - lowest) for index in order]
    spread = min(LABEL_GAP, 1 / max(len(order), 1))
    for place in range(1, len(heights)):  # upwards, then what was pushed beyond the top comes down again
        heights[place] = max(heights[place], heights[place - 1] + spread)
    limit = 1.0
    for place in reversed(range(len(heights))):
        heights[place] = limit = min(heights[place], limit)
        limit -= spread
    axes.get_xlim()  # from here on the limits stay, and with them where the points are
    to_axes = axes.transScale + axes.transLimits
    ends = [
        [tuple(to_axes.transform(points[index])), (LABEL_START, height)]
        for index, height in zip(order, heights, strict=True)
    ]
    # One collection: an arrow for each label takes most of the time of a plot.
    leaders = LineCollection(ends, colors="#cccccc", linewidths=0.6, transform=axes.transAxes, clip_on=False, zorder=1)
    leaders.set_in_layout(False)
    axes.add_collection(leaders, autolim=False)
    for index, height in zip(order, heights, strict=True):
        name = f" {shorten(names[index], LONGEST_LABEL)}"
        axes.text(LABEL_START, height, name, fontsize=8, parse_math=False, transform=axes.transAxes, va="center")
    if n_drawn > len(names):
        axes.text(LABEL_START, -0.06, f" and {n_drawn - len(names)} more", fontsize=8, transform=axes.transAxes)


def _reference_lines(axes: Axes, summary: Summary, task: TaskSummary) -> None:
    """What the untrained model scores, and where there are labels, what the most frequent one does."""
    for row in summary.rows_of(task):
        score = row.metrics.get(task.main_metric)
        if row.is_reference and score and score.mean is not None:
            name = f"untrained{row.method.removeprefix(BASE)}" if row.is_untrained else row.method
            axes.axhline(score.mean, color="#999999", linestyle=":", linewidth=1)
            where = axes.get_yaxis_transform()
            axes.text(0.01, score.mean, name, transform=where, fontsize=7, va="bottom", parse_math=False)


def _curves(axes: Axes, rows: Sequence[Row]) -> None:
    """Training losses, one line for each seed, with the method's name beside the axes where its first line ends."""
    names, ends = [], []
    drawn: dict[str, int] = {}
    for row in rows:
        number = drawn[row.family] = drawn.get(row.family, -1) + 1
        style, color = LINES[number % len(LINES)], COLORS.get(row.family, "#333333")
        curves = [[(step, loss) for step, loss in curve if loss is not None] for curve in row.curves]
        for points in filter(None, curves):
            axes.plot(*zip(*points, strict=True), style, color=color, linewidth=1.4)
        if curves and curves[0]:
            names.append(row.method)
            ends.append(curves[0][-1])
    axes.set_ylim(bottom=0)
    _place_labels(axes, names[:MAX_LABELS], ends[:MAX_LABELS], len(names))


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path) as part:
        figure.savefig(part, dpi=130, format="png")
