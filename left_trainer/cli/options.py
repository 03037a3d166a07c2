"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from left_trainer.ranges import COUNT, Range

DTYPES = ("float32", "bfloat16", "float16", "auto")


def number(allowed: Range, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    """The type of a flag whose value is one of the numbers `allowed`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            expected = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}.") from None
        if value not in allowed:
            raise argparse.ArgumentTypeError(f"{text} must be {allowed}.")
        return value

    return parse


positive = number(COUNT)


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """How the base model is loaded."""
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the weights (default: that of the run, else that of the checkpoint)"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code that comes with the base model; read it first"
    )
