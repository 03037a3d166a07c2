"""A report for people: a section of the model card, the terminal, and the loss curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from left_trainer.callbacks.tables import format_bytes, format_table
from left_trainer.data.cut_rows import describe_cuts
from left_trainer.evaluation.scores import is_score
from left_trainer.runs.report import Sample, TrainingReport
from left_trainer.shown_text import code, markdown, printable, table_lines
from left_trainer.storage.whole import whole_file
from left_trainer.tasks import get_task

if TYPE_CHECKING:
    from left_trainer.runs.evaluation import EvaluationReport

MISSING = "-"


def results_section(report: TrainingReport) -> str:
    """The report's main figures, and how to use the model, as sections of the model card."""
    title = f"## Results on {markdown(report.task)}"
    if report.diverged_at_step is not None:
        return (
            f"{title}\n\nThe training **diverged at step {report.diverged_at_step}**, at a "
            f"learning rate of {report.learning_rate or 0:g}. Nothing was saved beside its checkpoints.\n"
        )
    lines = [
        title,
        "",
        *table_lines(_score_columns(report), [(markdown(name), *rest) for name, *rest in _score_rows(report)]),
        "",
        *_kept(report),
        *([f"{_majority(report)}", ""] if report.majority_share is not None else []),
        f"{report.trainable_parameters or 0:,} of {report.total_parameters:,} parameters trained "
        f"({report.trainable_percent or 0:.3f} %), {report.train_steps} steps of {report.train_batch_size} rows"
        f"{_processes(report)} at a learning rate of {report.learning_rate or 0:g}, seed {report.seed}.",
        "",
        *_sizes(report),
        *_cuts(report),
        *_memory(report),
        f"The prompt was {code(repr(report.prompt))}; this uses it:",
        "",
        "```bash",
        "echo 'Your text' | left-trainer generate --adapter THIS_FOLDER",
        "```",
        "",
    ]
    return "\n".join(lines)


def format_report(report: TrainingReport, folder: str) -> str:
    """Scores before and after, samples, and where the files are, for the terminal."""
    samples = [_sample(sample, number) for number, sample in enumerate(report.samples, 1)]
    title = f"Test scores, {report.task} with {report.method}"
    table = format_table(title, _score_columns(report), _score_rows(report))
    speed = report.train_steps_per_second
    pace = f"Trained {report.train_steps} steps at {speed:.2f} steps/s. " if speed else ""
    what = "Model" if report.method == "full" else "Adapter"
    majority = [_majority(report)] if report.majority_share is not None else []
    majority += _kept(report)
    where = f"{pace}{what}, report, model card and plots are in {folder}"
    return printable("\n".join(["", *samples, table, *majority, "", *_cuts(report), *_memory(report), where]))


def _processes(report: TrainingReport) -> str:
    return f" in {report.processes} processes" if report.processes > 1 else ""


def _cuts(report: TrainingReport) -> list[str]:
    """What was cut of the rows, as a paragraph; no line where nothing was."""
    sentence = describe_cuts(report.cut_rows)
    return [sentence, ""] if sentence else []


def _memory(report: TrainingReport) -> list[str]:
    """The planned peak beside the measured one, as a paragraph; no line where one of them is not known."""
    measured = report.peak_memory_bytes.step
    if report.planned is None or measured is None:
        return []
    planned, phase = format_bytes(report.planned.peak_bytes), report.planned.peak_phase
    # The size of a process does not grow by what it reuses.
    least = "at least " if report.device == "cpu" else ""
    shown = f"{least}{format_bytes(measured)} measured"
    return [f"Memory of a step: {planned} planned, most in its {phase} phase; {shown}.", ""]


def format_evaluation(report: EvaluationReport, path: Path | None) -> str:
    """Scores and samples of a saved model, and where the report is, for the terminal."""
    samples = [_sample(sample, number) for number, sample in enumerate(report.samples, 1)]
    scores = [(name, _score(value)) for name, value in report.metrics.items() if is_score(name)]
    beams = "greedy" if report.num_beams == 1 else f"{report.num_beams} beams"
    limit = f", at most {report.max_new_tokens} tokens" if report.max_new_tokens else ""
    rows = "1 row" if report.test_rows == 1 else f"{report.test_rows} rows"
    title = f"Test scores, {report.task}: {rows} of {report.test_file} ({beams}{limit})"
    lines = ["", *samples, format_table(title, ("metric", "score"), scores)]
    return printable("\n".join([*lines, *([] if path is None else ["", f"The report is in {path}"])]))


def draw_losses(log_history: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw training and evaluation loss over steps to a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no half a step
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="loss per target token (nats)")
    axes.set_title(title, parse_math=False)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with whole_file(path) as part:
        figure.savefig(part, dpi=120, format="png")


def _score_columns(report: TrainingReport) -> tuple[str, ...]:
    return ("metric", "before", "after", *(["teacher"] if report.teacher and report.teacher.metrics else []))


def _sizes(report: TrainingReport) -> list[str]:
    """How the model has shrunk, as a paragraph; no line where it has not."""
    if report.shrinking is None:
        return []
    from left_trainer.compression.size_text import described  # late: its package loads torch

    before, after = report.shrinking.parameters_before, report.shrinking.parameters_after
    change = described(report.shrinking.sizes[0], report.shrinking.sizes[-1])
    return [
        f"The model has shrunk from {before:,} to {after:,} parameters apart from embeddings and output head "
        f"({100 * after / before:.1f} %): {change}.",
        "",
    ]


def _score_rows(report: TrainingReport) -> list[tuple[str, ...]]:
    """The loss and the task's metrics, before and after training, and those of the teacher."""
    before, after = report.metrics.before or {}, report.metrics.after or {}
    teacher = report.teacher.metrics if report.teacher else None
    names = [name for name in before if is_score(name) and (name in after or not after)]
    return [
        (name, _score(before[name]), _score(after.get(name)), *([_score(teacher.get(name))] if teacher else []))
        for name in names
    ]


def _kept(report: TrainingReport) -> list[str]:
    """How much of the teacher's quality the student has, as a paragraph; no line where that is not known."""
    if not report.teacher or not report.teacher.share_kept:
        return []
    kept, main = report.teacher.share_kept, get_task(report.task).main_metric
    shown = {main: kept[main]} if main in kept else kept
    shares = ", ".join(f"{100 * (share or 0):.1f} % of its {name}" for name, share in shown.items())
    return [f"The teacher is {markdown(report.teacher.name)}; the model has {shares}.", ""]


def _majority(report: TrainingReport) -> str:
    """The accuracy to beat."""
    return f"Always answering with the most frequent label has an accuracy of {report.majority_share:.2f}."


def _score(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _sample(sample: Sample, number: int) -> str:
    lines = [f"source:    {_shorten(sample.source)}", f"reference: {sample.reference}"]
    if sample.before is not None:
        lines.append(f"before:    {_shorten(sample.before)}")
    if sample.after is not None:
        lines.append(f"after:     {_shorten(sample.after)}")
    if sample.prediction is not None:
        lines.append(f"predicted: {_shorten(sample.prediction)}")
    return "\n".join([f"Sample {number}", *(f"  {line}" for line in lines), ""])


def _shorten(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else f"{text[:limit].rstrip()} ..."
