"""Which cells a comparison has: from what a user asks for to checked cells, before anything is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from left_trainer.comparison.cell import Cell
from left_trainer.comparison.flags import DECIDED, flags_of, parse_flags
from left_trainer.comparison.general_text import general_rows, why_unreadable
from left_trainer.comparison.launcher import check_launcher
from left_trainer.comparison.layout import DEFAULT_METHODS, DEFAULT_TASKS, Entry, GridOptions, Layout, Plan
from left_trainer.comparison.settings import (
    Setting,
    check_labels,
    check_references,
    check_told_apart,
    read_setting,
    references,
)
from left_trainer.data.arguments import DataArguments
from left_trainer.methods import get_method, list_methods
from left_trainer.methods.apply import build_config
from left_trainer.methods.patterns import check_patterns
from left_trainer.methods.trial import check_shapes
from left_trainer.models import build_skeleton, load_tokenizer
from left_trainer.ranges import POSITIVE, is_number
from left_trainer.secret_values import take_tokens
from left_trainer.tasks import get_task
from left_trainer.trainer.checks import Request, check_model_and_method
from left_trainer.trainer.teacher_checks import check_teacher, teacher_source
from left_trainer.training_args import LeftTrainingArguments

DEFAULTS_OF = {"methods": ",".join(DEFAULT_METHODS), "tasks": ",".join(DEFAULT_TASKS)}
ALL = "all"
TUNABLE = ("learning_rate",)
DATA_FIELDS = tuple(field.name for field in dataclasses.fields(DataArguments) if not field.name.startswith("max_"))


@dataclass(frozen=True)
class Grid:
    """A whole comparison, checked.

    Args:
        bases: One cell for each task and model, which scores the untrained model.
        plans: One for each setting and task.
        left_out: Methods that `all` does not include here, with the reason.
        no_general_loss: Why it will not be known what a model forgets; `None` where it will.
    """

    bases: tuple[Cell, ...]
    plans: tuple[Plan, ...]
    left_out: Mapping[str, str]
    no_general_loss: str | None = None

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All of them; the runs of a plan with trials have the learning rate they would have without."""
        return (*self.bases, *(cell for plan in self.plans for cell in (*plan.trials, *plan.runs)))


def make_grid(options: GridOptions, output_dir: Path) -> Grid:
    """Lay out the cells, and check what can be checked before weights are loaded.

    Raises:
        ValueError: A name that is not known, an argument that no run can have, data that cannot be used, a method that
            does not work on the model.
        FileNotFoundError: A file that does not exist.
    """
    _check(options)
    options = dataclasses.replace(options, arguments=take_tokens(options.arguments))
    general_rows(options.general_text_file)  # or an error
    tasks = [_entry(entry) for entry in options.tasks]
    named = [read_setting(entry) for entry in options.methods if entry != ALL]
    _check_names(options, tasks)
    check_labels(named)
    check_references(named, options.arguments)
    _check_trials(options, named)
    left_out = _left_out(options, named, output_dir)
    settings = [*named, *_others(options, named, left_out)]
    _check_distinct("tasks", [task.name for task in tasks])
    check_references(settings, options.arguments)
    layouts = [Layout(options, tuple(settings), output_dir, task) for task in tasks]
    bases = tuple(cell for layout in layouts for cell in layout.bases())
    plans = tuple(layout.plan(setting) for layout in layouts for setting in settings)
    for plan in plans[: len(settings)]:  # on the first task; the models are the same on the others
        check_cell(layouts[0].standing(plan.runs[0]), output_dir)
    _check_distinct("methods", [_title(plan) for plan in plans[: len(settings)]])
    check_told_apart(settings)
    return Grid(bases, plans, left_out, _why_no_general_loss(bases[0], output_dir))


def _why_no_general_loss(cell: Cell, output_dir: Path) -> str | None:
    """Why the cells will have no general loss. Raises `ValueError` where the text is the user's own."""
    model_args, _, args = cell.parse(output_dir)
    reason = why_unreadable(cell.general_text_file, load_tokenizer(model_args.source(args)))
    if reason and cell.general_text_file:
        raise ValueError(f"general_text_file={cell.general_text_file!r} cannot be used: {reason}")
    return reason


def check_cell(cell: Cell, output_dir: Path) -> None:
    """Raise `ValueError` where the method does not work on the model, or its options or targets do not fit it."""
    model_args, _, args = cell.parse(output_dir)
    source, method = model_args.source(args), get_method(args.peft_method)
    request = Request(source, args, method, teacher=teacher_source(None, args))
    check_model_and_method(request)
    if request.teacher is not None:
        check_teacher(request, load_tokenizer(source))
    if method.derive_from_data is None:
        skeleton = build_skeleton(source)
        planned = build_config(skeleton, method, args.peft_options, source.family)
        if planned is not None:
            check_patterns(skeleton, planned)
            check_shapes(skeleton, planned, method.name)


def _check(options: GridOptions) -> None:
    options.seed_range()  # or an error
    if options.launcher is not None:
        check_launcher(options.launcher)
    if options.tune is not None and options.tune not in TUNABLE:
        raise ValueError(f"tune={options.tune!r} is not supported. Allowed: {', '.join(TUNABLE)}.")
    if options.tune and not _are_positive(options.tune_factors):
        raise ValueError(f"tune_factors={options.tune_factors!r} must be positive numbers, for example 0.3 1 3.")
    for what, entries in (("methods", options.methods), ("tasks", options.tasks)):
        if not entries:
            raise ValueError(f"{what} is empty. Pass at least one, for example --{what} {DEFAULTS_OF[what]}.")


def _check_trials(options: GridOptions, settings: Sequence[Setting]) -> None:
    """Trials have the seed 42, and what they refer to needs a run with it."""
    refers = any(references({**options.arguments, **setting.arguments}) for setting in settings)
    if options.tune and refers and LeftTrainingArguments.seed not in options.seed_range():
        raise ValueError(
            f"seeds={options.seeds!r} lacks seed {LeftTrainingArguments.seed}, with which tune={options.tune!r} tries "
            "the settings that refer to others. Add it, or share one folder: --plan on one machine, --work on all."
        )


def _are_positive(values: Any) -> bool:
    """Whether these are numbers; from YAML anything may come."""
    if not isinstance(values, list | tuple):
        return False
    return bool(values) and all(is_number(value) and value in POSITIVE for value in values)


def _entry(entry: str | Mapping[str, Any]) -> Entry:
    if isinstance(entry, str):
        return Entry(entry)
    if not isinstance(entry, Mapping) or "task" not in entry:
        raise ValueError(
            f"{entry!r} has no task. Write a name, or a mapping such as {{task: NAME, ...}} with further arguments."
        )
    arguments = {name: value for name, value in entry.items() if name != "task"}
    if references(arguments):
        raise ValueError(f"The task {entry['task']!r} refers to the result of a setting. Refer to it in methods.")
    return Entry(str(entry["task"]), parse_flags(flags_of(arguments), list(DECIDED)))


def _check_names(options: GridOptions, tasks: Sequence[Entry]) -> None:
    for task in tasks:
        get_task(task.name)
    shared = [name for name in DATA_FIELDS if name in options.arguments]
    if len(tasks) > 1 and shared:
        lines = "".join(f"\n    - {{task: {task.name}, {shared[0]}: ...}}" for task in tasks[:2])
        raise ValueError(
            f"--{shared[0]} is given for {len(tasks)} tasks at once. Compare one task, --tasks {tasks[0].name}, or "
            f"give each task its own data in a YAML file: --config FILE with\n  tasks:{lines}"
        )


def _left_out(options: GridOptions, named: Sequence[Setting], output_dir: Path) -> dict[str, str]:
    """Methods that `all` leaves out, with the reason; none where nobody asks for all."""
    reasons = {name: _unusable(options, name, output_dir) for name in _unnamed(options, named)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _others(options: GridOptions, named: Sequence[Setting], left_out: Mapping[str, str]) -> list[Setting]:
    """The methods that `all` adds to those that are named."""
    return [Setting(name) for name in _unnamed(options, named) if name not in left_out]


def _unnamed(options: GridOptions, named: Sequence[Setting]) -> list[str]:
    names = {setting.label for setting in named}
    return [record.name for record in list_methods() if record.name not in names] if ALL in options.methods else []


def _unusable(options: GridOptions, method: str, output_dir: Path) -> str | None:
    """Why `all` leaves a method out."""
    record = get_method(method)
    required = [name for name in record.required if record.derive_from_data is None]
    if required:
        return f"needs {', '.join(required)}"
    try:
        shared = {name: value for name, value in options.arguments.items() if name not in references(options.arguments)}
        check_cell(Cell("method", "", {**shared, "peft_method": method}, {}), output_dir)
    except (ValueError, ImportError) as error:
        return str(error)
    return None


def _title(plan: Plan) -> str:
    """The setting of a plan with its arguments: equal for plans that would do the same."""
    cell = plan.runs[0]
    return f"{cell.label} with {cell.arguments}"


def _check_distinct(what: str, titles: Sequence[str]) -> None:
    twice = next((title for title in titles if titles.count(title) > 1), None)
    if twice:
        hint = "List each method once, or with different options" if what == "methods" else "List each task once"
        raise ValueError(f"{twice} is listed twice in {what}. {hint}.")
