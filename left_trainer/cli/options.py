"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from left_trainer.embedded import MODEL_NAMES
from left_trainer.plugins import add_plugin_option
from left_trainer.ranges import COUNT, Range
from left_trainer.secret_values import remember

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
    """How the base model is loaded, and what brings its method."""
    add_plugin_option(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the weights (default: that of the run, else that of the checkpoint)"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code that comes with the base model; read it first"
    )
    parser.add_argument("--model_revision", metavar="REV", help="branch, tag or commit of a name on the Hub")
    parser.add_argument("--token", help="Hub token for private names (default: HF_TOKEN, or that of hf auth login)")


def add_row_options(parser: argparse.ArgumentParser, purpose: str, of_task: str) -> None:
    """Which rows of a file are read, and as what.

    Args:
        parser: To add them to.
        purpose: What the rows are for.
        of_task: What the task is for, and which one it is by default.
    """
    parser.add_argument("--test_file", metavar="FILE", help=f"{purpose}: JSONL, CSV or Parquet")
    parser.add_argument("--task", help=of_task)
    parser.add_argument("--source_column", metavar="NAME", help="column to read (default: that of the task)")
    parser.add_argument("--target_column", metavar="NAME", help="column of the references (default: that of the task)")


def hub_options(options: argparse.Namespace) -> dict[str, Any]:
    """Revision and token of a name on the Hub, as `ModelSource` takes them."""
    remember({"token": options.token})
    return {"revision": options.model_revision, "token": options.token}


def check_adapter(name: str) -> None:
    """Raise `FileNotFoundError` where `--adapter` is neither a folder nor can be `user/name` on the Hub."""
    from left_trainer.models.hub import is_hub_name

    if Path(name).is_dir() or ("/" in name and name not in MODEL_NAMES and is_hub_name(name)):
        return
    raise FileNotFoundError(
        f"--adapter {name!r} does not exist. Pass the output_dir of a training run, or user/name of an adapter on the "
        "Hub."
    )
