"""Which cells a comparison has: from what a user asks for to checked cells, before anything is trained."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from left_trainer.comparison.cell import Cell, Kind
from left_trainer.comparison.conditions import conditions, data_sha256
from left_trainer.comparison.flags import DECIDED, flags_of, parse_flags
from left_trainer.comparison.general_text import general_rows, why_unreadable
from left_trainer.data.arguments import DataArguments
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
from left_trainer.training_args import LeftTrainingArguments

DEFAULT_METHODS = ("lora", "ia3", "prefix_tuning", "prompt_tuning", "p_tuning", "full")
DEFAULT_TASKS = ("summarization", "translation", "dialogue", "classification")
DEFAULTS_OF = {"methods": ",".join(DEFAULT_METHODS), "tasks": ",".join(DEFAULT_TASKS)}
ALL = "all"
TUNABLE = ("learning_rate",)
SEEDS = Range(at_least=1, at_most=1000)
DATA_FIELDS = tuple(field.name for field in dataclasses.fields(DataArguments) if not field.name.startswith("max_"))


@dataclass(frozen=True)
class GridOptions:
    """What to compare.

    Args:
        methods: Names, or mappings of a `peft_method` and arguments of `left-trainer train` for it alone; `all` stands
            for every method that works on the model and needs no further option.
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
    """A method or a task by name, with arguments of `left-trainer train` for it alone."""

    name: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """One method on one task: trials of learning rates, if any, then one run for each seed.

    `n_widenings` of the trials were added since.
    """

    trials: tuple[Cell, ...]
    runs: tuple[Cell, ...]
    n_widenings: int = 0


@dataclass(frozen=True)
class Grid:
    """A whole comparison, checked.

    Args:
        bases: One cell for each task, which scores the untrained model.
        plans: One for each method and task.
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
    tasks = [_entry(entry, "task") for entry in options.tasks]
    named = [_entry(entry, "peft_method") for entry in options.methods if entry != ALL]
    _check_names(options, tasks, named)
    left_out = _left_out(options, named, output_dir)
    methods = [*named, *_others(options, named, left_out)]
    _check_distinct("tasks", [task.name for task in tasks])
    bases, plans = [], []
    for task in tasks:
        make = functools.partial(_make_cell, options, output_dir, task, _data(options, task, output_dir))
        bases.append(make("base", {"peft_method": "full", "seed": LeftTrainingArguments.seed}))
        plans += [_plan(method, make, options, output_dir) for method in methods]
    for plan in plans[: len(methods)]:  # on the first task; the model is the same on the others
        check_cell(plan.runs[0], output_dir)
    _check_distinct("methods", [_titles(plan) for plan in plans[: len(methods)]])
    return Grid(tuple(bases), tuple(plans), left_out, _why_no_general_loss(bases[0], output_dir))


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
    check_model_and_method(Request(source, args, method))
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


def _entry(entry: str | Mapping[str, Any], key: str) -> Entry:
    if isinstance(entry, str):
        return Entry(entry)
    if not isinstance(entry, Mapping) or key not in entry:
        raise ValueError(
            f"{entry!r} has no {key}. Write a name, or a mapping such as {{{key}: NAME, ...}} with further arguments."
        )
    arguments = {name: value for name, value in entry.items() if name != key}
    decided = [name for name in DECIDED if name != "peft_kwargs"]
    return Entry(str(entry[key]), parse_flags(flags_of(arguments), decided))


def _check_names(options: GridOptions, tasks: Sequence[Entry], methods: Sequence[Entry]) -> None:
    for task in tasks:
        get_task(task.name)
    for method in methods:
        get_method(method.name)
    shared = [name for name in DATA_FIELDS if name in options.arguments]
    if len(tasks) > 1 and shared:
        lines = "".join(f"\n    - {{task: {task.name}, {shared[0]}: ...}}" for task in tasks[:2])
        raise ValueError(
            f"--{shared[0]} is given for {len(tasks)} tasks at once. Compare one task, --tasks {tasks[0].name}, or "
            f"give each task its own data in a YAML file: --config FILE with\n  tasks:{lines}"
        )


def _left_out(options: GridOptions, named: Sequence[Entry], output_dir: Path) -> dict[str, str]:
    """Methods that `all` leaves out, with the reason; none where nobody asks for all."""
    reasons = {name: _unusable(options, name, output_dir) for name in _unnamed(options, named)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _others(options: GridOptions, named: Sequence[Entry], left_out: Mapping[str, str]) -> list[Entry]:
    """The methods that `all` adds to those that are named."""
    return [Entry(name) for name in _unnamed(options, named) if name not in left_out]


def _unnamed(options: GridOptions, named: Sequence[Entry]) -> list[str]:
    names = {entry.name for entry in named}
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


def _data(options: GridOptions, task: Entry, output_dir: Path) -> dict[str, str]:
    _, data_args, _ = Cell("base", task.name, {**options.arguments, **task.arguments}, {}).parse(output_dir)
    if data_args.streaming:
        raise ValueError(
            "streaming=True cannot be compared: cells are known by the content of their data, which is read in whole. "
            "Remove --streaming; rows of files are stored once, for all cells."
        )
    return {"data_sha256": data_sha256(load_task_data(get_task(task.name), data_args))}


def _make_cell(
    options: GridOptions,
    output_dir: Path,
    task: Entry,
    data: Mapping[str, Any],
    kind: Kind,
    arguments: Mapping[str, Any],
) -> Cell:
    cell = Cell(
        kind=kind,
        task=task.name,
        arguments={**options.arguments, **task.arguments, **arguments},
        conditions={},
        general_text_file=options.general_text_file,
        save_adapter=options.save_adapters and kind == "method",
    )
    return dataclasses.replace(cell, conditions=conditions(cell, data, output_dir))


def _plan(
    method: Entry, make: Callable[[Kind, Mapping[str, Any]], Cell], options: GridOptions, output_dir: Path
) -> Plan:
    """One run for each seed, and a trial for each learning rate; trials have the first seed."""
    arguments = {**method.arguments, "peft_method": method.name}
    first = LeftTrainingArguments.seed
    runs = tuple(make("method", {**arguments, "seed": seed}) for seed in range(first, first + options.seeds))
    rates = _rates(runs[0], options, output_dir) if options.tune else []
    trials = tuple(make("trial", {**arguments, "learning_rate": rate, "seed": first}) for rate in rates)
    return Plan(trials, runs)


def _rates(cell: Cell, options: GridOptions, output_dir: Path) -> list[float]:
    """Learning rates around the one that a run would have."""
    model_args, _, args = cell.parse(output_dir)
    rate, _ = choose_learning_rate(args, get_method(args.peft_method), model_args.source(args))
    return [float(f"{rate * factor:.3g}") for factor in options.tune_factors]


def _titles(plan: Plan) -> str:
    """The method of a plan with its options: equal for plans that would do the same."""
    cell = plan.runs[0]
    return f"{cell.method} with {cell.arguments}"


def _check_distinct(what: str, titles: Sequence[str]) -> None:
    twice = next((title for title in titles if titles.count(title) > 1), None)
    if twice:
        hint = "List each method once, or with different options" if what == "methods" else "List each task once"
        raise ValueError(f"{twice} is listed twice in {what}. {hint}.")
