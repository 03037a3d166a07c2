"""Options that several commands share."""

from __future__ import annotations

import argparse

DTYPES = ("float32", "bfloat16", "float16", "auto")


def positive(text: str) -> int:
    """A number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """How the base model is loaded."""
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the weights (default: that of the run, else that of the checkpoint)"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code that comes with the base model; read it first"
    )
