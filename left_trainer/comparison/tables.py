"""The tables of a comparison: Markdown, CSV, LaTeX, and plain text for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from left_trainer.callbacks.tables import format_bytes, format_table
from left_trainer.comparison.cell import BASE
from left_trainer.comparison.rows import WHERE_ROWS_DIFFER, Column, Failure, Format, Score, Summary, TaskSummary
from left_trainer.shown_text import code, printable, table_lines
from left_trainer.shown_text import markdown as as_markdown

EMPTY = "-"
FAILED = "failed"
NO_SCORE = Score(None, None, None, None, None)
LATEX_SPECIAL = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}"}
LATEX_SPECIAL |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
TERMINAL = ("test_loss_after", "peak_memory_train_bytes", "train_steps_per_second", "run_seconds")
# Too long for a printed table, and the same in all rows of a usual one.
CSV_ONLY = ("train_steps", "general_loss_before", "test_loss_before", "learning_rate_source")


def format_value(value: Any, kind: Format) -> str:
    """A figure for people; `-` where there is none."""
    if value is None:
        return EMPTY
    formats = {
        "integer": lambda: f"{value:,.0f}",
        "bytes": lambda: format_bytes(value),
        "percent": lambda: f"{value:.3f}",
        "share": lambda: f"{value:.1f} %",
        "rate": lambda: f"{value:,.2f}" if value < 100 else f"{value:,.0f}",
        "seconds": lambda: format_seconds(value),
        "loss": lambda: f"{value:.3f}",
        "learning_rate": lambda: f"{value:.2g}",
        "text": lambda: str(value),
    }
    return formats[kind]()


def format_seconds(seconds: float) -> str:
    """A duration in the two largest of its units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def format_score(score: Score | None) -> str:
    """A mean, with the half width of its interval where there is one."""
    if score is None or score.mean is None:
        return EMPTY
    if score.low is None or score.high is None:
        return f"{score.mean:.1f}"
    return f"{score.mean:.1f} ± {(score.high - score.low) / 2:.1f}"


def quality_table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Methods x tasks: the main metric of each, references first, then the best methods first."""
    cells = {(row.method, row.task): row for row in summary.rows}
    failed = {(failure.method, failure.task) for failure in summary.failures}
    untrained = [row.method for row in summary.rows if row.is_untrained] or [BASE]
    methods = dict.fromkeys([*untrained, *summary.methods])

    def cell(method: str, task: TaskSummary) -> str:
        row = cells.get((method, task.name))
        if row is None:
            return FAILED if (method, task.name) in failed else EMPTY
        return format_score(row.metrics.get(task.main_metric))

    header = ["method", *(f"{task.name} ({task.main_metric})" for task in summary.tasks)]
    return header, [[method, *(cell(method, task) for task in summary.tasks)] for method in methods]


def figures_table(summary: Summary, task: TaskSummary) -> tuple[list[str], list[list[str]]]:
    """One row for each method on a task, with every figure that is printed."""
    columns = _printed(summary)
    header = ["method", *(column.title for column in columns), *task.metrics]
    return header, [
        [
            row.method,
            *(format_value(row.values[column.key], column.format) for column in columns),
            *(format_score(row.metrics.get(metric)) for metric in task.metrics),
        ]
        for row in summary.rows_of(task)
    ]


def markdown(summary: Summary) -> str:
    """Both tables, what they were measured on, and what failed."""
    parts = [f"# {as_markdown(summary.title)}", "", f"Model: {code(summary.model)}. {_intervals(summary)}", ""]
    parts += [*_markdown_table(*quality_table(summary)), ""]
    for task in summary.tasks:
        parts += [f"## {as_markdown(f'{task.name}: {task.summary}')}", "", as_markdown(_settings_line(task)), ""]
        parts += [*_markdown_table(*figures_table(summary, task)), ""]
    parts += [f"- {column.title}: {column.help}" for column in _printed(summary)]
    parts += [f"- {as_markdown(f'{row.id}: {row.notes}')}" for row in summary.rows if row.notes]
    if summary.failures:
        parts += ["", "## Failed", "", *(f"- {as_markdown(_failure(failure))}" for failure in summary.failures)]
    parts += ["", *(f"Measured on {as_markdown(machine)}." for machine in summary.machines)]
    parts += [f"All runs took {format_seconds(summary.run_seconds)}."] if summary.run_seconds is not None else []
    parts += [f"Made by {code(summary.command)}."] if summary.command else []
    return "\n".join(parts) + "\n"


def table_of(summary: Summary) -> Iterator[list[Any]]:
    """The header, then one line for each method on each task, unrounded, in bytes and rows; failures last."""
    metrics = list(dict.fromkeys(metric for task in summary.tasks for metric in task.metrics))
    keys = [column.key for column in summary.columns]
    header = ["task", "method", "family", "seeds", *keys]
    header += [f"{metric}_{part.name}" for metric in metrics for part in fields(Score)] + ["failure"]
    yield header
    for row in summary.rows:
        start = [row.task, row.method, row.family, " ".join(map(str, row.seeds))]
        scores = [part for metric in metrics for part in astuple(row.metrics.get(metric, NO_SCORE))]
        yield [*start, *(row.values[key] for key in keys), *scores, ""]
    for failure in summary.failures:
        yield [failure.task, failure.method, "", str(failure.seed), *[""] * (len(header) - 5), failure.reason]


def to_csv(summary: Summary) -> str:
    """The lines of `table_of`."""
    output = io.StringIO()
    csv.writer(output, lineterminator="\n").writerows(table_of(summary))
    return output.getvalue()


def latex(summary: Summary) -> str:
    """Both tables, to be included; they need the package booktabs."""
    parts = ["% Needs \\usepackage{booktabs}.", *_latex_table(*quality_table(summary), f"{summary.title}.")]
    for task in summary.tasks:
        parts += ["", *_latex_table(*figures_table(summary, task), f"{task.name}: {task.summary}.")]
    return "\n".join(parts) + "\n"


def terminal(summary: Summary, folder: Path) -> str:
    """The methods x tasks table, quality and cost on each task, what failed, and where the rest is."""
    title = f"{summary.title}, {summary.model}"
    blocks = ["", format_table(title, *quality_table(summary))] if len(summary.tasks) > 1 else ["", title]
    for task in summary.tasks:
        blocks += ["", format_table(task.name, *cost_table(summary, task))]
    if summary.failures:
        blocks += ["", *(f"Failed: {_failure(failure)}" for failure in summary.failures)]
    blocks += ["", f"Open {folder / 'index.html'}; tables, plots and results.jsonl are beside it."]
    return printable("\n".join(blocks))


def cost_table(summary: Summary, task: TaskSummary) -> tuple[list[str], list[list[str]]]:
    """One row for each method on a task: its quality, and what that costs."""
    columns = [column for column in summary.columns if column.key in (*TERMINAL, *WHERE_ROWS_DIFFER)]
    return ["method", task.main_metric, *(column.title for column in columns)], [
        [
            row.method,
            format_score(row.metrics.get(task.main_metric)),
            *(format_value(row.values[column.key], column.format) for column in columns),
        ]
        for row in summary.rows_of(task)
    ]


def _printed(summary: Summary) -> list[Column]:
    return [column for column in summary.columns if column.key not in CSV_ONLY]


def _failure(failure: Failure) -> str:
    return f"{failure.method} on {failure.task}, seed {failure.seed}: {failure.reason}"


def _intervals(summary: Summary) -> str:
    several = len(summary.seeds) > 1
    start = f"Means of {len(summary.seeds)} seeds" if several else f"One run each, seed {summary.seeds[0]}"
    found = {score.interval for row in summary.rows for score in row.metrics.values()}
    kinds = {"seeds": "over seeds (Student's t)", "rows": "over the rows of the test split (bootstrap)"}
    shown = [text for kind, text in kinds.items() if kind in found]
    return f"{start}. ± is half of the 95 % interval {' or, with one seed, '.join(shown)}." if shown else f"{start}."


def _settings_line(task: TaskSummary) -> str:
    better = "Lower" if task.main_metric in task.lower_is_better else "Higher"
    settings = [
        f"{better} {task.main_metric} is better",
        *(f"{title}: {value}" for title, value in task.settings.items()),
    ]
    return f"{'; '.join(settings)}."


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    return table_lines(list(map(as_markdown, header)), [list(map(as_markdown, row)) for row in rows])


def _latex_table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> Iterator[str]:
    yield r"\begin{table}"
    yield rf"\caption{{{_latex(caption)}}}"
    yield rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}"
    yield r"\toprule"
    yield " & ".join(map(_latex, header)) + r" \\"
    yield r"\midrule"
    for row in rows:
        yield " & ".join(map(_latex, row)) + r" \\"
    yield r"\bottomrule"
    yield r"\end{tabular}"
    yield r"\end{table}"


def _latex(text: str) -> str:
    text = " ".join(printable(text).split())  # an empty line would end a paragraph inside of the table
    return "".join(LATEX_SPECIAL.get(character, character) for character in text).replace("±", r"$\pm$")
