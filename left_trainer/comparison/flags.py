"""The arguments of `left-trainer train` that a comparison is given, on the command line or in YAML."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from left_trainer.runs.fine_tuning import training_parser
from left_trainer.secret_values import take_tokens

# What a comparison decides itself, each with what to say instead.
DECIDED = {
    "output_dir": "--output_dir of the comparison",
    "seed": "--seeds",
    "peft_method": "--methods",
    "peft_kwargs": "a YAML file, --config FILE with methods: [{peft_method: NAME, peft_kwargs: {...}}]",
    "task": "--tasks",
    "do_train": "--methods",
    "plugin": "--plugin of the comparison",
    "push_to_hub": "left-trainer train --push_to_hub with the setting you choose: a comparison would push each run",
}


@functools.cache
def argument_names() -> tuple[str, ...]:
    """The arguments of `left-trainer train`."""
    return tuple(action.dest for action in training_parser()._actions if action.dest not in ("help", "config"))


def parse_flags(flags: Sequence[str], decided: Sequence[str] = ()) -> dict[str, Any]:
    """The arguments of `left-trainer train` that `flags` give, and none that are at their defaults.

    A token of the hub is not among them: it becomes `HF_TOKEN`, so that no cell keeps it.

    Args:
        flags: As on a command line.
        decided: Names that may not be given here.

    Raises:
        ValueError: One of them is given, or several tokens. An unknown flag exits with code 2, as `argparse` does.
    """
    parser = training_parser()
    parser.prog = "left-trainer compare"
    parser.usage = "left-trainer compare [options], where --help lists those of a comparison and\n"
    parser.usage += "       left-trainer train --help those of a run"
    parser._defaults.clear()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    given = vars(parser.parse_args(list(flags)))
    for name in decided:
        if given.get(name, False) is not False:
            raise ValueError(f"--{name} cannot be set here. Use {DECIDED[name]}.")
    return take_tokens(given)


def flags_of(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments from YAML as flags, so that both are read in the same way (to YAML, 1e-3 is a string)."""
    flags: list[str] = []
    for name, value in arguments.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        texts = [json.dumps(item) if isinstance(item, (dict, bool)) else str(item) for item in values]
        flags += [f"--{name}", *texts] if isinstance(value, list) else [f"--{name}={texts[0]}"]
    return flags
