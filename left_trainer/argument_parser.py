"""Parsing of command lines whose errors are one paragraph: the flag, its value, what is allowed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from left_trainer.registry import did_you_mean

# Of argparse's messages: a flag's second spelling with dashes, and names of Python's types.
REWORDED = {
    r"argument (--\w+)/--[\w-]+": r"argument \1",
    r"invalid int value: (.+)": r"\1 is not an integer",
    r"invalid float value: (.+)": r"\1 is not a number",
}


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that takes no abbreviated flags and prints no usage with an error.

    The usage of a training has some 180 lines, in which nobody finds the one that says what is wrong.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As in `argparse`; an unknown flag gets "did you mean"."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self.about_unknown(unknown))
        return options

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in `argparse`; an empty value, such as that of an unset variable of a shell, is an error."""
        options, unknown = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(options, action.dest, None)
            if value in ("", [""]) and action.default != "":
                name = action.option_strings[0] if action.option_strings else action.metavar
                self.error(f"argument {name}: the value is empty. Leave it out, or pass one.")
        return options, unknown

    def about_unknown(self, arguments: Sequence[str]) -> str:
        """What to say of arguments that no flag takes."""
        name = arguments[0].partition("=")[0]
        if not name.startswith("-"):
            return f"{name!r} belongs to no option. Quote a value that contains spaces."
        return f"{name} is not an option.{self.nearest(name)}"

    def nearest(self, name: str) -> str:
        """`" Did you mean ...?"`, where there is a flag of a similar name, for a flag or a name of one."""
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        by_name = {flag.removeprefix("--").replace("-", "_"): flag for flag in flags}
        return did_you_mean(name.lstrip("-"), by_name)

    def error(self, message: str) -> NoReturn:
        """Print one paragraph to stderr and exit with 2."""
        for pattern, text in REWORDED.items():
            message = re.sub(pattern, text, message)
        end = "" if message.endswith((".", "?")) else "."
        self.exit(2, f"{self.prog}: error: {message}{end} `{self.prog} --help` lists all options.\n")
