"""The parser of a training: flags and, with `--config`, a YAML file."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

from trl import TrlParser

from left_trainer.argument_parser import ArgumentParser
from left_trainer.plugins import PLUGIN, load_plugins, plugins_in
from left_trainer.training_args import FLAGS_OF_OTHERS
from left_trainer.yaml_files import read_yaml_arguments


class ScriptParser(ArgumentParser, TrlParser):
    """Hugging Face's parser of dataclasses, with YAML by `--config`, and errors of one paragraph."""

    def parse_args_and_config(self, args: Iterable[str] | None = None, *given: Any, **options: Any) -> tuple[Any, ...]:
        """As in `TrlParser`, with a YAML file of which every key and its type are checked.

        Raises:
            FileNotFoundError: There is no such YAML file.
            ValueError: The file is not YAML, has a key that is no argument, or has a value that no run can have.
            TypeError: A value of another type than the argument's.
        """
        finder = ArgumentParser(prog=self.prog, add_help=False)
        finder.add_argument("--config")
        found, flags = finder.parse_known_args(None if args is None else list(args))
        load_plugins(plugins_in(sys.argv[1:] if args is None else list(args)))
        if found.config is not None:
            self._read_config(found.config)
        return super().parse_args_and_config(flags, *given, **options)  # type: ignore[no-any-return]

    def _read_config(self, path: str) -> None:
        values = read_yaml_arguments(path)
        environment = values.pop("env", {})
        if not isinstance(environment, dict):
            raise TypeError(f"config={path!r} has env={environment!r}, which must be a mapping of names to values.")
        names = {action.dest for action in self._actions}
        unknown = next((name for name in values if name not in names), None)
        if unknown is not None:
            raise ValueError(
                f"config={path!r} has {unknown!r}, which is not an option.{self.nearest(unknown)} `{self.prog} --help` "
                "lists all options."
            )
        self._check_choices(path, values)
        os.environ.update({name: str(value) for name, value in environment.items()})
        self.set_defaults_with_config(**values)

    def _check_choices(self, path: str, values: dict[str, Any]) -> None:
        """`argparse` reads a text in the file as it reads a flag, and leaves other values as they are."""
        for action in self._actions:
            value = values.get(action.dest)
            if isinstance(action.choices, (list, tuple)) and value is not None and value not in action.choices:
                allowed = ", ".join(map(str, action.choices))
                raise ValueError(f"config={path!r} has {action.dest}={value!r}. Expected one of {allowed}.")

    def parse_args_into_dataclasses(self, args: Any = None, *given: Any, **options: Any) -> tuple[Any, ...]:
        """As in `HfArgumentParser`; an argument that no flag takes ends the program."""
        _, unknown = self.parse_known_args(args)
        if unknown and not options.get("return_remaining_strings"):
            self.error(self.about_unknown(unknown))
        return super().parse_args_into_dataclasses(args, *given, **options)  # type: ignore[no-any-return]


class TrainingParser(ScriptParser):
    """A parser of `ModelArguments`, `DataArguments` and `LeftTrainingArguments`.

    Three flags that Hugging Face's scripts have in their `ModelArguments` stand there here too, and are handed on.
    """

    def parse_args_into_dataclasses(self, args: Any = None, *given: Any, **options: Any) -> tuple[Any, ...]:
        """As in `ScriptParser`."""
        model_args, data_args, training_args, *rest = super().parse_args_into_dataclasses(args, *given, **options)
        values = {name: getattr(model_args, name) for name in FLAGS_OF_OTHERS}
        return (model_args, data_args, training_args.replaced(**values), *_without_plugin(rest))


def _without_plugin(rest: Iterable[Any]) -> list[Any]:
    """What flags of no dataclass have become, less `--plugin`, which has been loaded."""
    kept = []
    for each in rest:
        if isinstance(each, Namespace):
            others = {name: value for name, value in vars(each).items() if name != PLUGIN}
            kept += [Namespace(**others)] if others else []
        else:
            kept.append(each)
    return kept
