"""The cells of a task: what is asked for, and the runs that this takes for each setting."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from left_trainer.comparison.cell import COMPRESSION_FIELDS, Cell, Kind
from left_trainer.comparison.conditions import conditions, data_sha256
from left_trainer.comparison.settings import Setting, level, references, stand_in
from left_trainer.data.arguments import ModelArguments
from left_trainer.data.loading import load_task_data
from left_trainer.methods import get_method
from left_trainer.ranges import Range
from left_trainer.tasks import get_task
from left_trainer.trainer.preparation import choose_learning_rate
from left_trainer.training_args import LeftTrainingArguments

DEFAULT_METHODS = ("lora", "ia3", "prefix_tuning", "prompt_tuning", "p_tuning", "full")
DEFAULT_TASKS = ("summarization", "translation", "dialogue", "classification")
SEEDS = Range(at_least=1, at_most=1000)
MODEL_FIELDS = tuple(field.name for field in dataclasses.fields(ModelArguments))


@dataclass(frozen=True)
class GridOptions:
    """What to compare.

    Args:
        methods: Settings as `settings.read_setting` takes them: names of methods, `NAME=METHOD+FIELD=VALUE`, or
            mappings of a `peft_method`, perhaps a `name`, and arguments of `left-trainer train` for it alone. `all`
            stands for every method that works on the model and needs no further option.
        tasks: Names, or mappings of a `task` and arguments for it alone: its files, columns, prompt.
        arguments: Arguments of `left-trainer train` for every run.
        seeds: Number of runs of each method on each task, with seeds that count up from 42; or the first and the last
            seed, as `45-47`.
        tune: `learning_rate`, or nothing.
        tune_factors: What the default rate is multiplied by in the trials.
        general_text_file: Plain text whose loss shows what a model forgets; by default generated English.
        save_adapters: Keep what each run trained.
        plugin: Files and modules that bring methods and tasks, for the processes of the runs.
        launcher: What starts the processes of each run, in the place of `python`; a setting may have its own.
    """

    methods: Sequence[str | Mapping[str, Any]] = DEFAULT_METHODS
    tasks: Sequence[str | Mapping[str, Any]] = DEFAULT_TASKS
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: int | str = 1
    tune: str | None = None
    tune_factors: Sequence[float] = (1 / 3, 1.0, 3.0)
    general_text_file: str | None = None
    save_adapters: bool = False
    plugin: Sequence[str] = ()
    launcher: str | None = None

    def seed_range(self) -> range:
        """The seeds. Raises `ValueError` unless they are a number, or a first and a last one."""
        start = LeftTrainingArguments.seed
        if type(self.seeds) is int and self.seeds in SEEDS:
            return range(start, start + self.seeds)
        found = re.fullmatch(r"(\d{1,9})-(\d{1,9})", self.seeds.strip()) if isinstance(self.seeds, str) else None
        seeds = range(int(found[1]), int(found[2]) + 1) if found else range(0)
        if len(seeds) not in SEEDS:
            raise ValueError(
                f"seeds={self.seeds!r} must be an integer, {SEEDS}, for so many seeds from {start} on, or FIRST-LAST "
                f"for these, such as {start + 3}-{start + 5}."
            )
        return seeds


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
class Layout:
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
        """One run for each seed, and a trial for each learning rate; trials have the seed 42."""
        arguments = {**setting.arguments, "peft_method": setting.method}
        first = LeftTrainingArguments.seed  # of all machines that share the seeds, so that they choose the same rate
        seeds = self.options.seed_range()
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
            plugins=tuple(self.options.plugin),
            launcher=(setting.launcher if setting else None) or self.options.launcher,
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
