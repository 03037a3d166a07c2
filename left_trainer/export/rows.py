"""The test rows of a run, as prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from left_trainer.adapters.run_settings import BASE_FOLDER
from left_trainer.data.arguments import DataArguments
from left_trainer.data.loading import load_task_data, load_test_rows
from left_trainer.runs.report import REPORT_FILE, TrainingReport
from left_trainer.tasks import get_task
from left_trainer.tasks.task import check_prompt
from left_trainer.trainer.checkpoints import NAME

OTHER_ROWS = "Pass rows with --test_file FILE, and --task where the folder has no report."


@dataclass(frozen=True)
class RowsAsked:
    """Which rows; `None` stands for what the run has used.

    Args:
        test_file: Rows instead of the run's own.
        task: Whose columns and prompt they have.
        prompt: Template with `{source}`.
        source_column: Column with the texts.
        target_column: Column with the references, which are not looked at.
        number: Most rows.
    """

    test_file: str | None = None
    task: str | None = None
    prompt: str | None = None
    source_column: str | None = None
    target_column: str | None = None
    number: int = 50


def prompts_of_run(path: str, asked: RowsAsked) -> tuple[str, list[str]]:
    """The template of the run's prompts, and the prompts of its first test rows.

    Args:
        path: Folder of the run.
        asked: Which rows.

    Raises:
        ValueError: There are no rows, or nothing says how prompts are made.
        FileNotFoundError: The file with the rows is not where the run has read it.
    """
    folder = _folder_of_run(Path(path))
    report = TrainingReport.read(folder) if (folder / REPORT_FILE).is_file() else None
    if asked.test_file is None and (report is None or report.data is None):
        missing = f"has no {REPORT_FILE}" if report is None else f"has a {REPORT_FILE} that does not name its data"
        raise ValueError(f"{path!r} {missing}, so there are no test rows to verify an export on. {OTHER_ROWS}")
    name = asked.task or (report.task if report else None)
    if name is None:
        raise ValueError(f"{path!r} has no {REPORT_FILE} that names its task. Pass --task, and with it --test_file.")
    task = get_task(name)
    template = asked.prompt or (report.prompt if report and asked.task in (None, report.task) else task.prompt)
    check_prompt(template)
    used = dict(report.data or {}) if report and asked.test_file is None else {}
    given = {name: getattr(asked, name) for name in ("test_file", "source_column", "target_column")}
    data = DataArguments(**used | {key: value for key, value in given.items() if value is not None})
    try:
        rows: Dataset = load_test_rows(task, data) if data.test_file else load_task_data(task, data)["test"]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The rows that the run was scored on are not there: {error} {OTHER_ROWS}") from error
    return template, [template.format(source=text) for text in rows["source"][: asked.number]]


def _folder_of_run(path: Path) -> Path:
    """Where the report of `path` is: its base model and its checkpoints are in folders of the run."""
    is_part = path.name == BASE_FOLDER or NAME.fullmatch(path.name)
    return path.parent if is_part and not (path / REPORT_FILE).is_file() else path
