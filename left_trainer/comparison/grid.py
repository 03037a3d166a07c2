"""Which cells a comparison has: from what a user asks for to checked cells, before anything is trained."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from left_trainer.comparison.cell import Cell, Kind
from left_trainer.comparison.flags import DECIDED, flags_of, parse_flags
from left_trainer.comparison.general_text import general_rows
from left_trainer.data.arguments import DataArguments
from left_trainer.data.loading import load_task_data
from left_trainer.embedded import MODEL_NAMES
from left_trainer.methods import get_method, list_methods
from left_trainer.methods.apply import build_config, check_patterns
from left_trainer.models import build_skeleton
from left_trainer.runs.fine_tuning import with_task_settings
from left_trainer.tasks import get_task
from left_trainer.trainer.checks import Request, check_model_and_method
from left_trainer.trainer.preparation import choose_learning_rate
from left_trainer.training_args import LeftTrainingArguments

DEFAULT_METHODS = ("lora", "ia3", "prefix_tuning", "prompt_tuning", "p_tuning", "full")
DEFAULT_TASKS = ("summarization", "translation", "dialogue", "classification")
DEFAULTS_OF = {"methods": ",".join(DEFAULT_METHODS), "tasks": ",".join(DEFAULT_TASKS)}
ALL = "all"
TUNABLE = ("learning_rate",)
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
class Plan:
    """One method on one task: trials of learning rates, if any, then one run for each seed."""

    trials: tuple[Cell, ...]
    runs: tuple[Cell, ...]


@dataclass(frozen=True)
class Grid:
    """A whole comparison, checked.

    Args:
        bases: One cell for each task, which scores the untrained model.
        plans: One for each method and task.
        left_out: Methods that `all` does not include here, with the reason.
    """

    bases: tuple[Cell, ...]
    plans: tuple[Plan, ...]
    left_out: Mapping[str, str]

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
    general_rows(options.general_text_file)
    tasks = [_entry(entry, "task") for entry in options.tasks]
    methods = [_entry(entry, "peft_method") for entry in options.methods if entry != ALL]
    _check_names(options, tasks, methods)
    left_out: dict[str, str] = {}
    if ALL in options.methods:
        others = [record.name for record in list_methods() if record.name not in {name for name, _ in methods}]
        reasons = {name: _unusable(options, name, output_dir) for name in others}
        left_out = {name: reason for name, reason in reasons.items() if reason is not None}
        methods += [(name, {}) for name in others if name not in left_out]
    seeds = range(LeftTrainingArguments.seed, LeftTrainingArguments.seed + options.seeds)
    bases, plans = [], []
    for task, for_task in tasks:
        make = functools.partial(_make_cell, options, output_dir, task, _data(options, task, for_task, output_dir))
        bases.append(make("base", {**for_task, "peft_method": "full", "seed": seeds[0]}))
        for method, for_method in methods:
            arguments = {**for_task, **for_method, "peft_method": method}
            runs = tuple(make("method", {**arguments, "seed": seed}) for seed in seeds)
            rates = _rates(runs[0], options, output_dir) if options.tune else []
            trials = (make("trial", {**arguments, "learning_rate": rate, "seed": seeds[0]}) for rate in rates)
            plans.append(Plan(tuple(trials), runs))
    for plan in plans[: len(methods)]:  # on the first task; the model is the same on the others
        check_cell(plan.runs[0], output_dir)
    _check_distinct([task for task, _ in tasks], plans)
    return Grid(tuple(bases), tuple(plans), left_out)


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


def conditions(cell: Cell, data: Mapping[str, Any], output_dir: Path) -> dict[str, Any]:
    """What a cell is measured on, the same on every machine: model, data, prompt, generation settings.

    Args:
        cell: The cell, with conditions that are not read.
        data: `data_sha256` of its task.
        output_dir: Of the comparison.
    """
    model_args, data_args, args = cell.parse(output_dir)
    task = get_task(cell.task)
    args = with_task_settings(task, args)
    return {
        "base_model": model_title(model_args.source(args).base_name),
        "prompt": data_args.prompt or task.prompt,
        "max_new_tokens": args.generation_max_length,
        "num_beams": args.generation_num_beams,
        **data,
    }


def model_title(name_or_path: str) -> str:
    """What a model is called on every machine: its hub name, `embedded/t5`, or the last part of a path."""
    embedded = {path: name for name, path in MODEL_NAMES.items()}
    path = Path(name_or_path)
    return embedded.get(name_or_path) or (path.resolve().name if path.exists() else name_or_path)


def data_sha256(data: DatasetDict) -> str:
    """Of the texts of all splits: the same on every machine, wherever the files lie."""
    digest = hashlib.sha256()
    for split in sorted(data):
        for column in ("source", "target"):
            for text in data[split][column]:
                digest.update(text.encode())
                digest.update(b"\0")
    return digest.hexdigest()


def _check(options: GridOptions) -> None:
    if options.seeds < 1:
        raise ValueError(f"seeds={options.seeds} is no number of runs. Pass 1 or more.")
    if options.tune is not None and options.tune not in TUNABLE:
        raise ValueError(f"tune={options.tune!r} is not supported. Allowed: {', '.join(TUNABLE)}.")
    if options.tune and (not options.tune_factors or min(options.tune_factors) <= 0):
        raise ValueError(f"tune_factors={list(options.tune_factors)} must be positive numbers, for example 0.3 1 3.")
    for what, entries in (("methods", options.methods), ("tasks", options.tasks)):
        if not entries:
            raise ValueError(f"{what} is empty. Name at least one, for example --{what} {DEFAULTS_OF[what]}.")


def _entry(entry: str | Mapping[str, Any], key: str) -> tuple[str, dict[str, Any]]:
    """A name with arguments of its own."""
    if isinstance(entry, str):
        return entry, {}
    if not isinstance(entry, Mapping) or key not in entry:
        raise ValueError(
            f"{entry!r} names no {key}. Write a name, or a mapping such as {{{key}: NAME, ...}} with arguments."
        )
    arguments = {name: value for name, value in entry.items() if name != key}
    return str(entry[key]), parse_flags(
        flags_of(arguments), decided=[name for name in DECIDED if name != "peft_kwargs"]
    )


def _check_names(
    options: GridOptions, tasks: Sequence[tuple[str, dict[str, Any]]], methods: Sequence[tuple[str, dict[str, Any]]]
) -> None:
    for name, _ in tasks:
        get_task(name)
    for name, _ in methods:
        get_method(name)
    shared = [name for name in DATA_FIELDS if name in options.arguments]
    if len(tasks) > 1 and shared:
        raise ValueError(
            f"--{shared[0]} is given for {len(tasks)} tasks at once. Compare one task, --tasks {tasks[0][0]}, or give "
            "each task its own data in a YAML file: --config FILE with\n  tasks:\n    - {task: "
            f"{tasks[0][0]}, {shared[0]}: ...}}\n    - {{task: {tasks[1][0]}, {shared[0]}: ...}}"
        )


def _make_cell(
    options: GridOptions, output_dir: Path, task: str, data: Mapping[str, Any], kind: Kind, arguments: Mapping[str, Any]
) -> Cell:
    cell = Cell(
        kind=kind,
        task=task,
        arguments={**options.arguments, **arguments},
        conditions={},
        general_text_file=options.general_text_file,
        save_adapter=options.save_adapters and kind == "method",
    )
    return dataclasses.replace(cell, conditions=conditions(cell, data, output_dir))


def _data(options: GridOptions, task: str, arguments: Mapping[str, Any], output_dir: Path) -> dict[str, str]:
    model_args, data_args, _ = Cell("base", task, {**options.arguments, **arguments}, {}).parse(output_dir)
    return {"data_sha256": data_sha256(load_task_data(get_task(task), data_args, token=model_args.token))}


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


def _rates(cell: Cell, options: GridOptions, output_dir: Path) -> list[float]:
    """Learning rates around the one that a run would have."""
    model_args, _, args = cell.parse(output_dir)
    rate, _ = choose_learning_rate(args, get_method(args.peft_method), model_args.source(args))
    return [float(f"{rate * factor:.3g}") for factor in options.tune_factors]


def _check_distinct(tasks: Sequence[str], plans: Sequence[Plan]) -> None:
    for names in (tasks, [plan.runs[0].name.rpartition("-")[0] + str(plan.runs[0].arguments) for plan in plans]):
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"{twice} is asked for twice. Name each task once, and each method once or with options.")
