"""Which cells a comparison has: from what a user asks for to checked cells, before anything is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from left_trainer.comparison.cell import COMPRESSION_FIELDS, Cell, Kind
from left_trainer.comparison.conditions import conditions, data_sha256
from left_trainer.comparison.flags import DECIDED, flags_of, parse_flags
from left_trainer.comparison.general_text import general_rows, why_unreadable
from left_trainer.comparison.settings import (
    Setting,
    check_labels,
    check_references,
    check_told_apart,
    level,
    read_setting,
    references,
    stand_in,
)
from left_trainer.data.arguments import DataArguments, ModelArguments
from left_trainer.data.loading import load_task_data
from left_trainer.methods import get_method, list_methods
from left_trainer.methods.apply import build_config
from left_trainer.methods.patterns import check_patterns
from left_trainer.methods.trial import check_shapes
from left_trainer.models import build_skeleton, load_tokenizer
from left_trainer.ranges import POSITIVE, Range, is_number
from left_trainer.secret_values import take_tokens
from left_trainer.tasks import get_task
from left_trainer.trainer.checks import Request, check_model_and_method
from left_trainer.trainer.preparation import choose_learning_rate
from left_trainer.trainer.teacher_checks import check_teacher, teacher_source
from left_trainer.training_args import LeftTrainingArguments

DEFAULT_METHODS = ("lora", "ia3", "prefix_tuning", "prompt_tuning", "p_tuning", "full")
DEFAULT_TASKS = ("summarization", "translation", "dialogue", "classification")
DEFAULTS_OF = {"methods": ",".join(DEFAULT_METHODS), "tasks": ",".join(DEFAULT_TASKS)}
ALL = "all"
TUNABLE = ("learning_rate",)
SEEDS = Range(at_least=1, at_most=1000)
MODEL_FIELDS = tuple(field.name for field in dataclasses.fields(ModelArguments))
DATA_FIELDS = tuple(field.name for field in dataclasses.fields(DataArguments) if not field.name.startswith("max_"))


@dataclass(frozen=True)
class GridOptions:
    """What to compare.

    Args:
        methods: Settings as `settings.read_setting` takes them: names of methods, `NAME=METHOD+FIELD=VALUE`, or
            mappings of a `peft_method`, perhaps a `name`, and arguments of `left-trainer train` for it alone. `all`
            stands for every method that works on the model and needs no further option.
        tasks: Names, or mappings of a `task` and arguments for it alone: its files, columns, prompt.
        arguments: Arguments of `left-trainer train` for every run.
        seeds: Number of runs of each method on each task; seeds count up from 42.
        tune: `learning_rate`, or nothing.
        tune_factors: What the default rate is multiplied by in the trials.
        general_text_file: Plain text whose loss shows what a model forgets; by default generated English.
        save_adapters: Keep what each run trained.
    """

    methods: Sequence[str | Mapping[str, Any]] = DEFAULT_METHODS
    tasks: Sequence[str | Mapping[str, Any]] = DEFAULT_TASKS
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: int = 1
    tune: str | None = None
    tune_factors: Sequence[float] = (1 / 3, 1.0, 3.0)
    general_text_file: str | None = None
    save_adapters: bool = False


@dataclass(frozen=True)
class Entry:
    """A task by name, with arguments of `left-trainer train` for it alone."""

    name: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """One setting on one task: trials of learning rates, if any, then one run for each seed.

    `n_widenings` of the trials were added since. `level` is 0 where the setting refers to no other, otherwise one more
    than those it refers to.
    """

    trials: tuple[Cell, ...]
    runs: tuple[Cell, ...]
    n_widenings: int = 0
    level: int = 0


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
    left_out = _left_out(options, named, output_dir)
    settings = [*named, *_others(options, named, left_out)]
    _check_distinct("tasks", [task.name for task in tasks])
    check_references(settings, options.arguments)
    layouts = [_Layout(options, tuple(settings), output_dir, task) for task in tasks]
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
    if not isinstance(options.seeds, int) or options.seeds not in SEEDS:
        raise ValueError(f"seeds={options.seeds!r} must be an integer, {SEEDS}.")
    if options.tune is not None and options.tune not in TUNABLE:
        raise ValueError(f"tune={options.tune!r} is not supported. Allowed: {', '.join(TUNABLE)}.")
    if options.tune and not _are_positive(options.tune_factors):
        raise ValueError(f"tune_factors={options.tune_factors!r} must be positive numbers, for example 0.3 1 3.")
    for what, entries in (("methods", options.methods), ("tasks", options.tasks)):
        if not entries:
            raise ValueError(f"{what} is empty. Pass at least one, for example --{what} {DEFAULTS_OF[what]}.")


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
        check_cell(Cell("method", "", {**options.arguments, "peft_method": method}, {}), output_dir)
    except (ValueError, ImportError) as error:
        return str(error)
    return None


@dataclass(frozen=True)
class _Layout:
    """The cells of one task."""

    options: GridOptions
    settings: tuple[Setting, ...]
    output_dir: Path
    task: Entry
    digests: dict[str, str] = dataclasses.field(default_factory=dict)

    def bases(self) -> list[Cell]:
        """One for each model that a setting starts from, the first setting's first."""
        cells: dict[str, Cell] = {}
        for setting in self.settings:
            its_own = {name: value for name, value in setting.arguments.items() if name in MODEL_FIELDS}
            own = its_own if "model_name_or_path" in its_own else {}
            arguments = stand_in(own, self.settings, self.options.arguments)
            cell = self._cell("base", {**arguments, "peft_method": "full", "seed": LeftTrainingArguments.seed})
            cells.setdefault(cell.conditions["base_model"], cell)
        return list(cells.values())

    def plan(self, setting: Setting) -> Plan:
        """One run for each seed, and a trial for each learning rate; trials have the first seed."""
        arguments = {**setting.arguments, "peft_method": setting.method}
        first = LeftTrainingArguments.seed
        seeds = range(first, first + self.options.seeds)
        runs = tuple(self._cell("method", {**arguments, "seed": seed}, setting) for seed in seeds)
        rates = self._rates(runs[0]) if self.options.tune else []
        trials = tuple(
            self._cell("trial", {**arguments, "learning_rate": rate, "seed": first}, setting) for rate in rates
        )
        return Plan(trials, runs, level=level(setting, self.settings, self.options.arguments))

    def standing(self, cell: Cell) -> Cell:
        """The cell with models that exist before anything has run, for checks."""
        arguments = stand_in(cell.arguments, self.settings, self.options.arguments)
        return dataclasses.replace(cell, arguments=arguments)

    def _cell(self, kind: Kind, arguments: Mapping[str, Any], setting: Setting | None = None) -> Cell:
        shared = {**self.options.arguments, **self.task.arguments}
        if setting is None:  # of a base, which learns nothing
            shared = {name: value for name, value in shared.items() if name not in COMPRESSION_FIELDS}
        cell = Cell(
            kind=kind,
            task=self.task.name,
            arguments={**shared, **arguments},
            conditions={},
            general_text_file=self.options.general_text_file,
            save_adapter=kind == "method" and (self.options.save_adapters or self._is_referred_to(setting)),
            setting=setting.name if setting else None,
        )
        standing = self.standing(cell)
        return dataclasses.replace(cell, conditions=conditions(standing, self._data(standing), self.output_dir))

    def _is_referred_to(self, setting: Setting | None) -> bool:
        names = [references({**self.options.arguments, **other.arguments}).values() for other in self.settings]
        return setting is not None and any(setting.label in found for found in names)

    def _data(self, cell: Cell) -> dict[str, str]:
        """The digest of a cell's data, which are read once for all cells that have the same."""
        _, data_args, _ = cell.parse(self.output_dir)
        if data_args.streaming:
            raise ValueError(
                "streaming=True cannot be compared: cells are known by the content of their data, which is read in "
                "whole. Remove --streaming; rows of files are stored once, for all cells."
            )
        key = repr(data_args)
        if key not in self.digests:
            self.digests[key] = data_sha256(load_task_data(get_task(self.task.name), data_args))
        return {"data_sha256": self.digests[key]}

    def _rates(self, cell: Cell) -> list[float]:
        """Learning rates around the one that a run would have."""
        model_args, _, args = self.standing(cell).parse(self.output_dir)
        rate, _ = choose_learning_rate(args, get_method(args.peft_method), model_args.source(args))
        return [float(f"{rate * factor:.3g}") for factor in self.options.tune_factors]


def _title(plan: Plan) -> str:
    """The setting of a plan with its arguments: equal for plans that would do the same."""
    cell = plan.runs[0]
    return f"{cell.label} with {cell.arguments}"


def _check_distinct(what: str, titles: Sequence[str]) -> None:
    twice = next((title for title in titles if titles.count(title) > 1), None)
    if twice:
        hint = "List each method once, or with different options" if what == "methods" else "List each task once"
        raise ValueError(f"{twice} is listed twice in {what}. {hint}.")
